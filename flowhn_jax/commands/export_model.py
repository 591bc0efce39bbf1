"""`flowhn export`: a run's model as safetensors with a Hugging Face config."""

from collections.abc import Callable, Sequence

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags, define_ema


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that exports the model."""
    workdir = flags.path("workdir", "folder of the run.", required=True)
    out = flags.path(
        "out", "folder to write; for --format=reference a .pth or an .npz file.", required=True
    )
    checkpoint = flags.string(
        "checkpoint", "latest", "latest, best (by validation loss), or the number of a step."
    )
    ema = define_ema(flags)
    form = flags.choice(
        "format",
        "huggingface",
        ["huggingface", "reference"],
        "huggingface: a folder that transformers loads; reference: the state dict of the authors' "
        "code, for a FlowHN that it has.",
    )

    def main() -> None:
        from flowhn_jax.interop import transfer

        formats = {"huggingface": transfer.export_run, "reference": transfer.export_reference}
        print(formats[form.value](workdir.value, out.value, checkpoint.value, ema.value))

    return main


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and export the model."""
    with runner.command("export", define, argv) as main:
        main()
