"""Train a model: `flowhn train`, or python train.py --config=flowhn_tiny --workdir=runs/tiny."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from flowhn_jax.training.health.preemption import StopRequest
from flowhn_jax.utils import cpu

if TYPE_CHECKING:
    from flowhn_jax.commands.flags import Flags


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and train."""
    cpu.prepare_memory()
    _print_first_line(sys.argv[1:] if argv is None else argv)
    stop = StopRequest()
    stop.listen()  # before the imports, which take seconds
    try:
        from flowhn_jax.commands import runner

        with runner.command("train", partial(define, stop=stop), argv) as main:
            main()
    finally:
        stop.ignore()


def _print_first_line(arguments: Sequence[str]) -> None:
    """Print that the command has started, unless for --help or in one of several processes."""
    is_help = any(argument.lstrip("-").startswith("help") for argument in arguments)
    is_of_several = any(argument.lstrip("-").startswith("process_id") for argument in arguments)
    if not is_help and not is_of_several:
        print("flowhn: loading JAX ...", flush=True)


def define(flags: "Flags", stop: StopRequest | None = None) -> Callable[[], None]:
    """Define the flags and return the function that trains.

    Args:
      flags: receives the definitions.
      stop: requests to stop the run. None only where the function is not called, as for the docs.
    """
    from flowhn_jax.commands import train_recipe
    from flowhn_jax.commands.flags import define_processes

    parse_config = train_recipe.define(flags)
    workdir = flags.path(
        "workdir",
        "folder for checkpoints, metrics and config; an existing run is resumed.",
        required=True,
    )
    join_processes = define_processes(flags)

    def main() -> None:
        from flowhn_jax.training.summary import command_line, print_summary
        from flowhn_jax.training.trainer import fit

        join_processes()
        assert stop is not None, "only `run` calls this function, and it passes `stop`"
        summary = partial(print_summary, workdir=workdir.value, argv=sys.argv, stop=stop)
        command = command_line(sys.argv)
        fit(parse_config(), workdir.value, stop=stop, on_end=summary, command=command)

    return main
