"""`sweep`: train what is missing of a grid, then write the table and the figure."""

from collections.abc import Sequence

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.config import Config
from flowhn_jax.report.table import to_json
from flowhn_jax.storage import place
from flowhn_jax.sweep.grid import Point
from flowhn_jax.sweep.results import FILES, collect, point_row, write
from flowhn_jax.training import runs
from flowhn_jax.utils.progress import progress
from flowhn_jax.utils.text import one_line


def sweep(
    points: Sequence[Point], configs: Sequence[Config], workdir: str, index: int | None = None
) -> int:
    """Train the points that are missing in the workdir, then write and print the results.

    A run that fails becomes a row with its message, and the next one follows.

    Args:
      points: the points of the grid.
      configs: the configs of the points.
      workdir: receives a folder for each run, data/, sweep.json, sweep.md and sweep.png.
      index: the only point to train, whose row is printed instead of the results; None: all.

    Returns:
      The number of runs that failed.

    Raises:
      ValueError: the workdir is a file.
    """
    for name in FILES:
        (place(workdir) / name).check_own_file()
    workdir_lib.make(workdir)
    chosen = list(zip(points, configs, strict=True))
    if index is not None:
        chosen = [chosen[index]]
    trained = {point.name: config for point, config in chosen}
    failures: dict[str, str] = {}

    def on_error(name: str, error: Exception) -> None:
        failures[name] = one_line(error) or type(error).__name__

    with progress(runs.steps_left(trained, workdir), "sweeping", "steps") as bar:
        has_all = runs.train_missing(
            trained,
            workdir,
            bar.annotate,
            bar.update,
            shares_data=len({config.model.context for config in configs}) == 1,
            on_error=on_error,
        )
    if not has_all:
        print("Stopped. Run the same command again to continue.")
    elif index is not None:
        ((point, config),) = chosen
        print(to_json(point_row(point, config, workdir, failures.get(point.name))))
    else:
        write(collect(points, configs, workdir, failures), workdir)
    return len(failures)
