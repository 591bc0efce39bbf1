"""`flowhn synthetic`: texts with something to recall. It does not import JAX."""

from collections.abc import Callable, Sequence

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that writes the texts."""
    from flowhn_jax.data.synthetic import TASKS, write

    out = flags.path("out", ".jsonl file to write.", required=True)
    tasks = flags.string("tasks", ",".join(TASKS), "names of tasks, separated by commas.")
    size = flags.integer("size", 200, "characters per document.")
    documents = flags.integer("documents", 100_000, "number of documents.")
    seed = flags.integer(
        "seed",
        1,
        "seed of the random numbers; use another one than --seed of `flowhn eval --mode=recall`, "
        "whose default is 0.",
    )

    def main() -> None:
        write(tasks.value.split(","), size.value, documents.value, seed.value, out.value)

    return main


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and write the texts."""
    with runner.command("synthetic", define, argv, shows_tracebacks=False) as main:
        main()
