"""Train a model: `flowhn train`, or python train.py --config=flowhn_tiny --workdir=runs/tiny."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from flowhn_jax.training.health.preemption import StopRequest

if TYPE_CHECKING:
    from flowhn_jax.commands.flags import Flags


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and train."""
    stop = StopRequest()
    stop.listen()  # before the imports, which take seconds
    try:
        from flowhn_jax.commands import runner

        runner.run("train", partial(define, stop=stop), argv)
    finally:
        stop.ignore()


def define(flags: "Flags", stop: StopRequest | None = None) -> Callable[[], None]:
    """Define the flags; return the function that trains, until `stop` asks for an end."""
    import absl.flags

    from flowhn_jax.commands.flags import define_config, define_processes

    parse_config = define_config(flags)
    workdir = absl.flags.DEFINE_string(
        "workdir",
        None,
        "folder for checkpoints, metrics and config; a run that is there is resumed.",
        required=True,
        flag_values=flags.values,
    )
    join_processes = define_processes(flags)

    def main() -> None:
        from flowhn_jax.training.loop import fit

        join_processes()
        fit(parse_config(), workdir.value, stop=stop)

    return main
