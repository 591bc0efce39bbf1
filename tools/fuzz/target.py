"""Targets of the fuzzer, and what they share: damaged files, flags and words."""

import pathlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from flowhn_jax import config as config_lib
from tools.fuzz import mutations
from tools.fuzz.child import Case, Sandbox
from tools.fuzz.words import WORDS

VALID = 0.05  # share of inputs that are not damaged


class Target(NamedTuple):
    """A kind of input to fuzz.

    Attributes:
      seeds: names of the valid inputs that it needs.
      build: makes a case in the sandbox, whose working folder holds these inputs.
      weight: relative frequency; lower for inputs that take longer.
    """

    seeds: tuple[str, ...]
    build: Callable[[random.Random, Sandbox], Case]
    weight: float = 1.0


def files_of(sandbox: Sandbox, *patterns: str) -> list[pathlib.Path]:
    """Return the files in the working folder that match a pattern, sorted."""
    return sorted(path for each in patterns for path in sandbox.work.glob(each) if path.is_file())


def damage_files(rng: random.Random, sandbox: Sandbox, *patterns: str) -> str:
    """Damage none, one or a few files that match the patterns; return a description."""
    if rng.random() < VALID:
        return ""
    notes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if found := files_of(sandbox, *patterns):
            notes.append(mutations.damage(rng, rng.choice(found)))
    return "; ".join(notes)


def of_files(
    program: Callable[[], Any], arguments: list[str], *patterns: str
) -> Callable[[random.Random, Sandbox], Case]:
    """Return a `build` that damages files of the patterns and always has the same arguments."""

    def build(rng: random.Random, sandbox: Sandbox) -> Case:
        return Case(program, arguments, damage_files(rng, sandbox, *patterns))

    return build


def _keys() -> dict[str, Any]:
    """Return all dotted keys of a config with their defaults."""
    found = {}

    def add(config: Any, prefix: str) -> None:
        for name, value in config.items():
            if hasattr(value, "items"):
                add(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    add(config_lib.default(), "")
    return found


KEYS = _keys()


def any_word(rng: random.Random) -> str:
    """Return a word or a number."""
    return rng.choice(WORDS) if rng.random() < 0.5 else str(mutations.number(rng))


def any_key(rng: random.Random) -> str:
    """Return a dotted key of a config, sometimes misspelt."""
    key = rng.choice(list(KEYS))
    kind = rng.random()
    if kind < 0.85:
        return key
    return rng.choice((key.replace("e", "o"), f"{key}.x", key.split(".")[0], "", "model..width"))


def overrides(rng: random.Random) -> list[str]:
    """Return override flags for a few keys, with values of any type."""
    found = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = any_key(rng)
        default = KEYS.get(key)
        value = any_word(rng) if rng.random() < 0.3 else mutations.number(rng)
        if isinstance(default, int) and isinstance(value, float):
            value = rng.choice((1, 2, 8, 16, 100, 1000, -1))
        found.append(f"--config.{key}={value}")
    return found
