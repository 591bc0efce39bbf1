"""`flowhn synthetic`: texts with something to recall. It does not import JAX."""

from collections.abc import Callable, Sequence

import absl.flags

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that writes the texts."""
    from flowhn_jax.data.synthetic import TASKS, write

    values = flags.values
    out = flags.define_path("out", ".jsonl file to write.", required=True)
    tasks = absl.flags.DEFINE_string(
        "tasks", ",".join(TASKS), "names of tasks, separated by commas.", flag_values=values
    )
    size = absl.flags.DEFINE_integer("size", 200, "characters per document.", flag_values=values)
    documents = absl.flags.DEFINE_integer(
        "documents", 100_000, "number of documents.", flag_values=values
    )
    seed = absl.flags.DEFINE_integer(
        "seed",
        1,
        "seed of the random numbers; use another one than --seed of `flowhn eval --mode=recall`, "
        "whose default is 0.",
        flag_values=values,
    )

    def main() -> None:
        write(tasks.value.split(","), size.value, documents.value, seed.value, out.value)

    return main


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and write the texts."""
    runner.run("synthetic", define, argv, keeps_memory=False, shows_tracebacks=False)
