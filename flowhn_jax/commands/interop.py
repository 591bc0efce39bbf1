"""`python -m flowhn_jax.interop export|import`: a run's model as safetensors, and back."""

from absl import flags

from flowhn_jax.commands import flags as cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_OUT = flags.DEFINE_string("out", None, "export: folder to write.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "export: latest, best by validation loss, or a step; the latest without it.",
)
_SOURCE = flags.DEFINE_string("source", None, "import: folder with config.json and safetensors.")


def _export() -> None:
    from flowhn_jax.checkpoints.parameters import LATEST
    from flowhn_jax.interop.transfer import export_run

    if _OUT.value is None or _SOURCE.value is not None:
        raise ValueError("export needs --out, the folder to write, and no --source.")
    print(export_run(_WORKDIR.value, _OUT.value, _CHECKPOINT.value or LATEST))


def _import() -> None:
    from flowhn_jax.interop.transfer import import_run

    if _SOURCE.value is None or (_OUT.value, _CHECKPOINT.value) != (None, None):
        raise ValueError(
            "import needs --source, a folder with config.json and safetensors, and no --out or "
            "--checkpoint."
        )
    print(import_run(_SOURCE.value, _WORKDIR.value))


def run() -> None:
    """Parse the flags and run the command."""
    cli.run({"export": _export, "import": _import})
