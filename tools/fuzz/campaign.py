"""Fuzzing of the command lines: many inputs, one after another, and a table of what came of them.

Each target gets one of the first inputs, and of the others a share by its weight.
Input i of a seed is always the same, so that a failure comes again with --seed and --only.
"""

import collections
import gc
import os
import pathlib
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import tqdm

from flowhn_jax.interop import transfer  # noqa: F401  what a command line imports, once for all
from flowhn_jax.report.table import markdown
from tools.fuzz import child, seeds
from tools.fuzz.targets import LAST, TARGETS, make_case

_LIMIT_S = 10.0
_TAIL_CHARACTERS = 3000


class Result(NamedTuple):
    """An input and what came of it."""

    number: int
    target: str
    case: child.Case
    outcome: child.Outcome


def fresh_seed() -> int:
    """A seed that no one has tried."""
    return int.from_bytes(os.urandom(4), "big")


def parse_targets(names: str | None) -> tuple[str, ...]:
    """Names with commas between them; None: all.

    Raises:
      ValueError: an unknown one.
    """
    if names is None:
        return tuple(TARGETS)
    for name in names.split(","):
        if name not in TARGETS:
            raise ValueError(f"--targets has {name!r}; accepted are {', '.join(TARGETS)}.")
    return tuple(names.split(","))


def results(seed: int, numbers: Sequence[int], targets: Sequence[str]) -> Iterator[Result]:
    """Runs the inputs of these numbers; those that take longest come last."""
    chosen = {number: _target(seed, number, targets) for number in numbers}
    needed = {name for target in set(chosen.values()) for name in TARGETS[target].seeds}
    root = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        seeds.make(root / "seeds", needed)
        gc.collect()
        gc.freeze()  # children would copy what the collector only looks at
        for number, target in sorted(chosen.items(), key=lambda item: item[1] == LAST):
            rooms = child.Rooms(root / str(number))
            rng = random.Random(f"{seed} {number} {target}")
            case = make_case(target, rng, rooms, root / "seeds")
            yield Result(number, target, case, child.run(case, rooms, _LIMIT_S))
            shutil.rmtree(rooms.root)
    finally:
        shutil.rmtree(root)


def _target(seed: int, number: int, targets: Sequence[str]) -> str:
    """Return the target of an input: each one first, then any of them by their weights."""
    if number < len(targets):
        return targets[number]
    weights = [TARGETS[name].weight for name in targets]
    return random.Random(f"{seed} {number}").choices(targets, weights)[0]


def show(seed: int, number: int, targets: Sequence[str]) -> int:
    """Prints one input and its whole output; how many failed."""
    (result,) = results(seed, [number], targets)
    print(_described(result), result.outcome.output, sep="\n")
    return result.outcome.verdict == "failed"


def run(seed: int, inputs: int, targets: Sequence[str]) -> int:
    """Prints the table, and each failure as it comes; how many there were.

    Raises:
      ValueError: no inputs are asked for.
    """
    if inputs < 1:
        raise ValueError(f"--inputs is {inputs}; accepted is 1 or more.")
    print(f"seed {seed}", flush=True)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    bar = tqdm.tqdm(total=inputs, unit="input", disable=not sys.stderr.isatty())
    for result in results(seed, range(inputs), targets):
        counts[result.target][result.outcome.verdict] += 1
        bar.update()
        if result.outcome.verdict == "failed":
            tail = result.outcome.output[-_TAIL_CHARACTERS:]
            again = f"--seed={seed} --targets={result.target} --only={result.number}"
            bar.write(f"{_described(result)}\npython -m tools.fuzz {again}\n{tail}\n")
            sys.stdout.flush()
    bar.close()
    print(_table(counts))
    return sum(count["failed"] for count in counts.values())


def _described(result: Result) -> str:
    command = shlex.join(argument[:100] for argument in result.case.arguments)
    return (
        (
            f"{result.outcome.verdict} {result.outcome.reason}: input {result.number} of "
            f"{result.target}: {command} ({result.case.note:.500})"
        )
        .encode(errors="backslashreplace")
        .decode()
    )


def _table(counts: dict[str, collections.Counter]) -> str:
    verdicts = ("accepted", "refused", "failed")
    total: collections.Counter = sum(counts.values(), collections.Counter())
    rows = [
        [name, *(f"{number:,}" for number in (count.total(), *(count[v] for v in verdicts)))]
        for name, count in [*sorted(counts.items()), ("all", total)]
    ]
    return markdown(["target", "inputs", *verdicts], rows)
