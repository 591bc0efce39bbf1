"""`python -m flowhn_jax.data.synthetic`."""

import argparse
import sys

from flowhn_jax.data.synthetic import TASKS, write
from flowhn_jax.utils.text import one_line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowhn_jax.data.synthetic",
        description="Writes texts with something to recall, as .jsonl for flowhn_jax.data.prepare.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tasks", default=",".join(TASKS), help="with commas between them (%(default)s)")
    add("--size", type=int, default=200, help="characters of a document (%(default)s)")
    add("--documents", type=int, default=100_000, help="how many (%(default)s)")
    add("--seed", type=int, default=1, help="not the one to ask by, eval.py's --seed (%(default)s)")
    add("--out", required=True, help="the .jsonl file to write")
    return parser


def run(argv: list[str] | None = None) -> None:
    """The command line; bad input ends it with one line and status 1."""
    options = _parser().parse_args(argv)
    try:
        write(**vars(options) | {"tasks": options.tasks.split(",")})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
