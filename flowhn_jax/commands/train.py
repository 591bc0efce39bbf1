"""Train a model: python train.py --config=configs/flowhn_tiny.py --workdir=runs/tiny."""

import sys
from collections.abc import Sequence
from functools import partial

from flowhn_jax.training.health.preemption import StopRequest


def run() -> None:
    """Parse the flags and train."""
    _print_first_line(sys.argv[1:])
    stop = StopRequest()
    stop.listen()  # before the imports, which take seconds
    try:
        _run(stop)
    finally:
        stop.ignore()


def _print_first_line(arguments: Sequence[str]) -> None:
    """Print that the command has started, before imports that take seconds."""
    is_help = any(argument.lstrip("-").startswith("help") for argument in arguments)
    is_of_several = any(argument.lstrip("-").startswith("process_id") for argument in arguments)
    if not is_help and not is_of_several:
        print("flowhn: loading JAX ...", flush=True)


def _run(stop: StopRequest) -> None:
    from absl import flags

    from flowhn_jax.commands import flags as cli

    config = cli.define_config()
    join_processes = cli.define_processes()
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder for checkpoints and metrics; resumes there.", required=True
    )

    def main() -> None:
        from flowhn_jax.training.summary import print_summary
        from flowhn_jax.training.trainer import fit

        join_processes()
        summary = partial(print_summary, workdir=workdir.value, argv=sys.argv, stop=stop)
        fit(cli.parse_config(config), workdir.value, stop=stop, on_end=summary)

    cli.run(main)
