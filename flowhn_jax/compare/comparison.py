"""`compare`: measure speed round-robin, train each model once, then write the report."""

from collections.abc import Mapping

import jax

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.files import latest_step
from flowhn_jax.compare.model_configs import with_data
from flowhn_jax.compare.results import FILES, collect, write
from flowhn_jax.compare.speed import FILE, measure, missing_measurements, read_measurements
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.storage import place
from flowhn_jax.training.trainer import fit
from flowhn_jax.utils.progress import progress
from flowhn_jax.utils.text import short_path

# The progress bar counts a measurement as this many steps, which take about as long.
_STEPS_PER_MEASUREMENT = 30


def compare(
    configs: Mapping[str, Config],
    size: str,
    workdir: str,
    *,
    trains: bool,
    rounds: int,
    repeats: int,
    report_only: bool,
) -> None:
    """Measure and train what is missing in the workdir, then write and print the report.

    Args:
      configs: the models to compare, by name.
      size: the name of the models' size, for the report.
      workdir: receives speed.jsonl, data/, a run's folder for each model, and results.json,
        results.csv, results.md, figure.png and figure.svg.
      trains: whether to train each model for its `train.steps`.
      rounds: number of measurements of each model.
      repeats: timed calls of each program per measurement.
      report_only: whether to measure and train nothing, and report what the workdir holds.

    Raises:
      ValueError, FileNotFoundError: the workdir is a file or holds other runs, or `report_only`
        finds no measurements.
    """
    for name in (FILE, *FILES):
        (place(workdir) / name).check_own_file()
    device = jax.devices()[0].device_kind
    if report_only:
        if not place(workdir).is_dir():
            raise FileNotFoundError(
                f"{short_path(workdir)} does not exist; run the command without --report_only "
                "first."
            )
    else:
        workdir_lib.make(workdir)
        if not _measure_and_train(configs, workdir, device, trains, rounds, repeats):
            print("Stopped. Run the same command again to continue.")
            return
    results = collect(configs, size, workdir, read_measurements(workdir, configs, device))
    write(results, workdir)


def _measure_and_train(
    configs: Mapping[str, Config],
    workdir: str,
    device: str,
    trains: bool,
    rounds: int,
    repeats: int,
) -> bool:
    """Measure and train what is missing; return False if a signal stopped it early."""
    missing = missing_measurements(configs, rounds, read_measurements(workdir, configs, device))
    folders = {name: str(place(workdir) / name) for name in configs}
    steps = 0
    if trains:
        left = (config.train.steps - latest_step(folders[n]) for n, config in configs.items())
        steps = sum(max(0, each) for each in left)
    total = len(missing) * _STEPS_PER_MEASUREMENT + steps
    with progress(total, "comparing", "steps") as bar:
        for _ in measure(configs, workdir, missing, repeats, bar.annotate):
            bar.update(_STEPS_PER_MEASUREMENT)
        for name, config in configs.items() if trains else ():
            bar.annotate(f"training {name}")
            if not config.data.path:  # all models train on one copy of the embedded corpus
                config = with_data(config, str(open_data(config, workdir).main.folder))
            if not fit(config, folders[name], bar.update):
                return False
    return True
