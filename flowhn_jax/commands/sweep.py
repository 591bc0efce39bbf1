"""`flowhn sweep`: train a recipe over a grid of config keys."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from absl.flags import FlagHolder

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags, define_config
from flowhn_jax.report.table import text_table
from flowhn_jax.utils import cpu

if TYPE_CHECKING:
    from flowhn_jax.config import Config
    from flowhn_jax.sweep.grid import Point


class _Options(NamedTuple):
    parse_config: "Callable[[], Config]"
    workdir: FlagHolder
    grid: FlagHolder
    index: FlagHolder
    only_list: FlagHolder


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that trains the grid."""
    options = _define(flags)
    return lambda: _main(options)


def _define(flags: Flags) -> _Options:
    return _Options(
        define_config(flags),
        flags.path(
            "workdir",
            "folder of the sweep, which continues there; receives a folder for each run.",
            required=True,
        ),
        flags.strings(
            "grid",
            [],
            "config key and its values, e.g. train.learning_rate=1e-3,3e-3; every combination of "
            "the keys' values is a run.",
        ),
        flags.integer(
            "index",
            None,
            "train only the point of this index, as in a job array; --list prints them.",
            minimum=0,
        ),
        flags.boolean("list", False, "print the points of the grid, and train nothing."),
    )


def _main(options: _Options) -> None:
    from flowhn_jax.sweep import grid

    points = grid.points(grid.parse_axes(options.grid.value))
    configs = [_config(point.values) for point in points]
    index = options.index.value
    if index is not None and index >= len(points):
        raise ValueError(
            f"--index must be below {len(points)}, the number of points of the grid; got {index}. "
            "--list prints them."
        )
    if options.only_list.value:
        print(_listing(points))
        return
    from flowhn_jax.sweep.sweep import sweep

    failed = sweep(points, configs, options.workdir.value, index)
    if failed:
        count = 1 if index is not None else len(points)
        sys.exit(
            f"error: {failed} of {count} runs failed; the same command tries them again. To see an "
            "error in full: flowhn train --workdir=FOLDER_OF_THE_RUN"
        )


def _config(values: Mapping[str, str]) -> "Config":
    """Return the config of the command line with the values of a point.

    Raises:
      ValueError: a key or a value is not valid; the message is that of its flag.
    """
    flags = Flags()
    options = _define(flags)
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    with runner.replacing_arguments([*sys.argv[1:], *overrides]):
        flags.parse(sys.argv)
        return options.parse_config()


def _listing(points: "Sequence[Point]") -> str:
    """Return the points as a table with their indices and folders."""
    keys = list(points[0].values)
    rows = [[str(index), *point.values.values(), point.name] for index, point in enumerate(points)]
    return text_table(["index", *keys, "folder"], rows, left=(len(keys) + 1,))


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and sweep."""
    cpu.prepare_memory()
    with runner.command("sweep", define, argv) as main:
        main()
