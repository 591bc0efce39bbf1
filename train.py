"""Trains a model: python train.py --config=configs/flowhn_tiny.py --workdir=runs/tiny."""

from flowhn_jax.training.preemption import StopRequest

_STOP = StopRequest()
if __name__ == "__main__":
    _STOP.listen()  # before the imports, which take seconds

from absl import flags  # noqa: E402

from flowhn_jax import cli  # noqa: E402

_CONFIG = cli.define_config()
_join_processes = cli.define_processes()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints and metrics; resumes there.", required=True
)


def main() -> None:
    """Trains by the flags."""
    from flowhn_jax.training.loop import fit

    _join_processes()
    fit(cli.parse_config(_CONFIG), _WORKDIR.value, stop=_STOP)


if __name__ == "__main__":
    try:
        cli.run(main)
    finally:
        _STOP.ignore()
