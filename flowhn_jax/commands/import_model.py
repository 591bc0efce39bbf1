"""`flowhn import`: a workdir made of a folder with safetensors and a Hugging Face config."""

from collections.abc import Callable, Sequence

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that imports the model."""
    source = flags.path(
        "source", "folder with config.json and safetensors.", required=True, others=("hf",)
    )
    workdir = flags.path("workdir", "workdir to make.", required=True)

    def main() -> None:
        from flowhn_jax.interop.transfer import import_run

        print(import_run(source.value, workdir.value))

    return main


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and import the model."""
    with runner.command("import", define, argv) as main:
        main()
