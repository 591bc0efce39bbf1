"""`compare`: measure speed round-robin, train what the budget allows, then write the report."""

import contextlib
import dataclasses
from collections.abc import Mapping

import jax

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.compare import results, scores, speed, training_data, training_plan
from flowhn_jax.compare.budget import Budget
from flowhn_jax.compare.run_grid import run_config, run_grid
from flowhn_jax.config import Config
from flowhn_jax.storage import place
from flowhn_jax.training import runs
from flowhn_jax.training.health.preemption import StopRequest
from flowhn_jax.utils.progress import progress
from flowhn_jax.utils.text import short_path


@dataclasses.dataclass(frozen=True)
class Training:
    """How the models of a comparison are trained.

    Attributes:
      budget: what each run may spend; None: nothing is trained.
      seeds: how many seeds each model is trained with.
      rates: learning rates to try, of which each model's best counts; empty: the recipe's.
      corpus: the text of configs that name no data: 'embedded' or 'packages'.
      recall: share of the training windows with texts of the recall tasks, on which the models are
        then scored.
    """

    budget: Budget | None = None
    seeds: int = 1
    rates: tuple[float, ...] = ()
    corpus: str = training_data.CORPORA[0]
    recall: float = 0.0

    @property
    def data(self) -> str:
        """What the models are trained on, in words."""
        return f"{self.corpus} with a share of {self.recall:g} for recall texts"


def compare(
    configs: Mapping[str, Config],
    size: str,
    workdir: str,
    training: Training,
    *,
    rounds: int,
    repeats: int,
    report_only: bool,
) -> None:
    """Measure and train what is missing in the workdir, then write and print the report.

    Args:
      configs: the models to compare, by name.
      size: the name of the models' size, for the report.
      workdir: receives speed.jsonl, training.json, data/, a folder for each run, and the files of
        the report.
      training: how the models are trained.
      rounds: number of measurements of each model.
      repeats: timed calls of each program per measurement.
      report_only: whether to measure and train nothing, and report what the workdir holds.

    Raises:
      ValueError, FileNotFoundError: the workdir is a file or holds other runs, or `report_only`
        finds no measurements.
    """
    for name in (speed.FILE, training_plan.FILE, *results.FILES):
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
        _measure(configs, workdir, device, rounds, repeats)
        if training.budget is not None and not _train(configs, workdir, device, training):
            print("Stopped. Run the same command again to continue.")
            return
    runs_of_all = run_grid(configs, training.rates, training.seeds)
    measurements = speed.read_measurements(workdir, configs, device)
    results.write(results.collect(configs, runs_of_all, size, workdir, measurements), workdir)


def _measure(
    configs: Mapping[str, Config], workdir: str, device: str, rounds: int, repeats: int
) -> None:
    """Measure the speed that is not in the workdir yet."""
    done = speed.read_measurements(workdir, configs, device)
    missing = speed.missing_measurements(configs, rounds, done)
    with progress(len(missing), "measuring", "measurements") as bar:
        for _ in speed.measure(configs, workdir, missing, repeats, bar.annotate):
            bar.update()


def _data_paths(configs: Mapping[str, Config], workdir: str, training: Training) -> dict[str, str]:
    """Return `data.path` of each model's runs."""
    return {
        name: training_data.data_path(
            workdir,
            training.corpus,
            training.recall,
            context=config.model.context,
            vocab_size=config.model.vocab_size,
            given=config.data.path,
        )
        for name, config in configs.items()
    }


def _train(configs: Mapping[str, Config], workdir: str, device: str, training: Training) -> bool:
    """Train and score the runs that are not in the workdir yet; return False after a signal."""
    assert training.budget is not None
    measurements = speed.read_measurements(workdir, configs, device)
    paths = _data_paths(configs, workdir, training)
    steps = training_plan.plan_steps(configs, workdir, training.budget, measurements, training.data)
    planned = {
        run.name: run_config(configs[run.model], run, steps[run.model], paths[run.model])
        for run in run_grid(configs, training.rates, training.seeds)
    }
    with progress(runs.steps_left(planned, workdir), "training", "steps") as bar:
        if not runs.train_missing(planned, workdir, bar.annotate, bar.update):
            return False
    with StopRequest() as stop, progress(len(planned), "scoring", "runs") as bar:
        with contextlib.suppress(KeyboardInterrupt), stop.interrupting():
            for _ in scores.score_missing(planned, workdir, bar.annotate):
                bar.update()
        return not stop.is_requested()
