"""Give damaged inputs to the commands: `python -m tools.fuzz --inputs=1000`."""

import argparse
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):  # one device; no writes outside the sandbox
    os.environ.pop(name, None)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tools.fuzz import campaign  # noqa: E402  JAX reads these variables on import


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exit with status 1 if an input failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=campaign.__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--inputs", type=int, default=1000, help="number of inputs (default %(default)s)")
    add("--seed", type=int, help="seed of the inputs (default: a fresh one)")
    add("--targets", help="names of targets, separated by commas (default: all)")
    add("--only", type=int, help="run only the input with this number, and print its output")
    options = parser.parse_args(argv)
    try:
        targets = campaign.parse_targets(options.targets)
        seed = campaign.fresh_seed() if options.seed is None else options.seed
        if options.only is not None:
            failed = campaign.show(seed, options.only, targets)
        else:
            failed = campaign.run(seed, options.inputs, targets)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
