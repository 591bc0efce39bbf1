"""Run many fuzzed inputs one after another and print a table of the results.

Each target gets one of the first inputs, and a share of the others by its weight. Input i of a
seed is always the same, so --seed and --only repeat a failure.
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

from flowhn_jax.interop import transfer  # noqa: F401  the commands' imports, once for all children
from flowhn_jax.report.table import markdown
from tools.fuzz import child, seeds
from tools.fuzz.targets import LAST, TARGETS, make_case

_LIMIT_S = 10.0
_TAIL_CHARACTERS = 3000


class Result(NamedTuple):
    """An input and its outcome."""

    number: int
    target: str
    case: child.Case
    outcome: child.Outcome


def fresh_seed() -> int:
    """Return a random seed."""
    return int.from_bytes(os.urandom(4), "big")


def parse_targets(names: str | None) -> tuple[str, ...]:
    """Return the targets of a list separated by commas, or all targets for None.

    Raises:
      ValueError: a name is unknown.
    """
    if names is None:
        return tuple(TARGETS)
    for name in names.split(","):
        if name not in TARGETS:
            raise ValueError(f"--targets must be among {', '.join(TARGETS)}; got {name!r}.")
    return tuple(names.split(","))


def results(seed: int, numbers: Sequence[int], targets: Sequence[str]) -> Iterator[Result]:
    """Run the inputs with these numbers, those that take longest last, and yield their results."""
    chosen = {number: _target(seed, number, targets) for number in numbers}
    needed = {name for target in set(chosen.values()) for name in TARGETS[target].seeds}
    root = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        seeds.make(root / "seeds", needed)
        gc.collect()
        gc.freeze()  # else the collector in a child would touch, and so copy, all pages
        for number, target in sorted(chosen.items(), key=lambda item: item[1] == LAST):
            sandbox = child.Sandbox(root / str(number))
            rng = random.Random(f"{seed} {number} {target}")
            case = make_case(target, rng, sandbox, root / "seeds")
            yield Result(number, target, case, child.run(case, sandbox, _LIMIT_S))
            shutil.rmtree(sandbox.root)
    finally:
        shutil.rmtree(root)


def _target(seed: int, number: int, targets: Sequence[str]) -> str:
    """Return the target of an input: each target once, then random ones by their weights."""
    if number < len(targets):
        return targets[number]
    weights = [TARGETS[name].weight for name in targets]
    return random.Random(f"{seed} {number}").choices(targets, weights)[0]


def show(seed: int, number: int, targets: Sequence[str]) -> int:
    """Print one input and its whole output; return the number of failures (0 or 1)."""
    (result,) = results(seed, [number], targets)
    print(_description(result), result.outcome.output, sep="\n")
    return result.outcome.verdict == "failed"


def run(seed: int, inputs: int, targets: Sequence[str]) -> int:
    """Run `inputs` inputs, print failures as they come and a table; return the number of failures.

    Raises:
      ValueError: `inputs` is less than 1.
    """
    if inputs < 1:
        raise ValueError(f"--inputs must be at least 1; got {inputs}.")
    print(f"seed {seed}", flush=True)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    bar = tqdm.tqdm(total=inputs, unit="input", disable=not sys.stderr.isatty())
    for result in results(seed, range(inputs), targets):
        counts[result.target][result.outcome.verdict] += 1
        bar.update()
        if result.outcome.verdict == "failed":
            tail = result.outcome.output[-_TAIL_CHARACTERS:]
            again = f"--seed={seed} --targets={result.target} --only={result.number}"
            bar.write(f"{_description(result)}\npython -m tools.fuzz {again}\n{tail}\n")
            sys.stdout.flush()
    bar.close()
    print(_table(counts))
    return sum(count["failed"] for count in counts.values())


def _description(result: Result) -> str:
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
