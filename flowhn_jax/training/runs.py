"""Many runs one after another, each in a folder of its own: those of a comparison or a sweep."""

import dataclasses
from collections.abc import Callable, Mapping

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.files import latest_step
from flowhn_jax.checkpoints.rows import read_rows
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.storage import place
from flowhn_jax.training.console import OnStep
from flowhn_jax.training.trainer import fit

OnError = Callable[[str, Exception], None]


def steps_left(configs: Mapping[str, Config], workdir: str) -> int:
    """Return how many steps `train_missing` has to do."""
    folder = place(workdir)
    done = {name: latest_step(str(folder / name)) for name in configs}
    return sum(max(0, config.train.steps - done[name]) for name, config in configs.items())


def train_missing(
    configs: Mapping[str, Config],
    workdir: str,
    describe: Callable[[str], None],
    on_step: OnStep,
    *,
    shares_data: bool = True,
    on_error: OnError | None = None,
) -> bool:
    """Train each run that is not complete to its last step; resume interrupted runs.

    Args:
      configs: the configs of the runs, by name.
      workdir: receives a folder for each run, and data/ for those that name no data.
      describe: is called with what is done next.
      on_step: is called after each step.
      shares_data: whether runs that name no data share one set, for which they need one context
        length; otherwise each has its own.
      on_error: is called with the name and the error of a run that fails, and the next one follows;
        None: the error is raised.

    Returns:
      Whether all runs were dealt with; False if a signal stopped one.

    Raises:
      Exception: the error of a run, if `on_error` is None.
    """
    for name, config in configs.items():
        describe(f"training {name}")
        folder = str(place(workdir) / name)
        try:
            if shares_data and not config.data.path:
                data = str(open_data(config, workdir).main.folder)
                config = dataclasses.replace(
                    config, data=dataclasses.replace(config.data, path=data)
                )
            if not is_complete(config, folder) and not fit(config, folder, on_step):
                return False
        except Exception as error:
            if on_error is None:
                raise
            on_error(name, error)
    return True


def is_complete(config: Config, workdir: str) -> bool:
    """Return whether the workdir holds the run of this config, trained and validated to its end."""
    if latest_step(workdir) != config.train.steps:
        return False
    rows = read_rows(workdir)
    is_validated = bool(rows) and rows[-1]["step"] == config.train.steps
    is_validated = is_validated and "validation_loss" in rows[-1]
    return is_validated and workdir_lib.read_config(workdir) == config
