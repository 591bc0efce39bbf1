"""Trains a model: python train.py --config=configs/flowhn_tiny.py --workdir=runs/tiny."""

from absl import flags

from flowhn_jax import cli

_CONFIG = cli.define_config()
_join_processes = cli.define_processes()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints and metrics; resumes there.", required=True
)


def main() -> None:
    """Trains by the flags."""
    from flowhn_jax.training.loop import fit

    _join_processes()
    fit(cli.parse_config(_CONFIG), _WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
