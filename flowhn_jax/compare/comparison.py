"""`compare`: speed in turns, then training one after another, then table and figure."""

import pathlib
import sys
from collections.abc import Mapping

import jax
import tqdm

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.files import latest_step
from flowhn_jax.compare.candidates import on_data
from flowhn_jax.compare.results import FILES, collect, write
from flowhn_jax.compare.speed import FILE, measure_turns, missing_turns, read_turns
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.training.loop import fit
from flowhn_jax.utils.files import check_own_file
from flowhn_jax.utils.text import short_path

_STEPS_OF_A_TURN = 30  # on the progress bar: about what it takes, beside steps of training


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
    """Measures and trains what is missing in the workdir, and draws the report of all.

    Args:
      configs: by name, those to compare; `train.steps` are trained where `trains`.
      size: of the models, for the report.
      workdir: receives speed.jsonl, data/, a run's folder for each model, and results.json,
        results.csv, results.md, figure.png and figure.svg.
      trains: whether to train.
      rounds: turns of each model.
      repeats: timed calls of each program in a turn.
      report_only: whether to draw the report of what is there and measure nothing.

    Raises:
      ValueError, FileNotFoundError: the workdir is a file, holds other runs or, for the report,
        no measurements.
    """
    for name in (FILE, *FILES):
        check_own_file(pathlib.Path(workdir) / name)
    device = jax.devices()[0].device_kind
    if report_only:
        if not pathlib.Path(workdir).is_dir():
            raise FileNotFoundError(
                f"{short_path(workdir)} is not there; measure without --report_only."
            )
    else:
        workdir_lib.make(workdir)
        if not _measure(configs, workdir, device, trains, rounds, repeats):
            print("stopped; the same command goes on from here")
            return
    results = collect(configs, size, workdir, read_turns(workdir, configs, device))
    write(results, workdir)


def _measure(
    configs: Mapping[str, Config],
    workdir: str,
    device: str,
    trains: bool,
    rounds: int,
    repeats: int,
) -> bool:
    """Whether all was done, and no signal came before."""
    missing = missing_turns(configs, rounds, read_turns(workdir, configs, device))
    folders = {name: str(pathlib.Path(workdir) / name) for name in configs}
    steps = 0
    if trains:
        left = (config.train.steps - latest_step(folders[n]) for n, config in configs.items())
        steps = sum(max(0, each) for each in left)
    total = len(missing) * _STEPS_OF_A_TURN + steps
    with tqdm.tqdm(total=total, unit="step", dynamic_ncols=True, file=sys.stderr) as bar:
        for _ in measure_turns(configs, workdir, missing, repeats, bar.set_description):
            bar.update(_STEPS_OF_A_TURN)
        for name, config in configs.items() if trains else ():
            bar.set_description(f"{name}, training")
            folder = open_data(config, workdir).folder
            if not fit(on_data(config, str(folder)), folders[name], bar.update):
                return False
    return True
