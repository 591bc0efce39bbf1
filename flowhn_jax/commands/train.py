"""Train a model: python train.py --config=configs/flowhn_tiny.py --workdir=runs/tiny."""

from flowhn_jax.training.health.preemption import StopRequest


def run() -> None:
    """Parse the flags and train."""
    stop = StopRequest()
    stop.listen()  # before the imports, which take seconds
    try:
        _run(stop)
    finally:
        stop.ignore()


def _run(stop: StopRequest) -> None:
    from absl import flags

    from flowhn_jax.commands import flags as cli

    config = cli.define_config()
    join_processes = cli.define_processes()
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder for checkpoints and metrics; resumes there.", required=True
    )

    def main() -> None:
        from flowhn_jax.training.trainer import fit

        join_processes()
        fit(cli.parse_config(config), workdir.value, stop=stop)

    cli.run(main)
