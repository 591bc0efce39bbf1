"""`flowhn export`: a run's model as safetensors with a Hugging Face config."""

from collections.abc import Callable, Sequence

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that exports the model."""
    workdir = flags.string("workdir", None, "folder of the run.", required=True)
    out = flags.string("out", None, "folder to write.", required=True)
    checkpoint = flags.string(
        "checkpoint", "latest", "latest, best (by validation loss), or the number of a step."
    )

    def main() -> None:
        from flowhn_jax.interop.transfer import export_run

        print(export_run(workdir.value, out.value, checkpoint.value))

    return main


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and export the model."""
    runner.run("export", define, argv)
