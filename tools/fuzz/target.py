"""What a target of the fuzzer is, and what targets share: damaged files, flags and words."""

import pathlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from flowhn_jax import config as config_lib
from tools.fuzz import mutations
from tools.fuzz.child import Case, Rooms
from tools.fuzz.words import WORDS

VALID = 0.05  # share of inputs that are left as they are


class Target(NamedTuple):
    """Something to fuzz.

    Attributes:
      seeds: the valid inputs that it needs, by name.
      build: makes a case in the rooms, whose box holds these inputs.
      weight: how often it is taken; less where an input takes longer.
    """

    seeds: tuple[str, ...]
    build: Callable[[random.Random, Rooms], Case]
    weight: float = 1.0


def files_of(rooms: Rooms, *patterns: str) -> list[pathlib.Path]:
    """Return the files of the box that match a pattern, in order."""
    return sorted(path for each in patterns for path in rooms.box.glob(each) if path.is_file())


def damage_files(rng: random.Random, rooms: Rooms, *patterns: str) -> str:
    """Damages one file of the patterns, or a few, or none; says how."""
    if rng.random() < VALID:
        return ""
    notes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if found := files_of(rooms, *patterns):
            notes.append(mutations.damage(rng, rng.choice(found)))
    return "; ".join(notes)


def of_files(
    program: Callable[[], Any], arguments: list[str], *patterns: str
) -> Callable[[random.Random, Rooms], Case]:
    """Damage to files of the patterns, and always the same arguments."""

    def build(rng: random.Random, rooms: Rooms) -> Case:
        return Case(program, arguments, damage_files(rng, rooms, *patterns))

    return build


def _keys() -> dict[str, Any]:
    """All dotted keys of a config with their defaults."""
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
    """Return a dotted key of a config, or nearly one."""
    key = rng.choice(list(KEYS))
    kind = rng.random()
    if kind < 0.85:
        return key
    return rng.choice((key.replace("e", "o"), f"{key}.x", key.split(".")[0], "", "model..width"))


def overrides(rng: random.Random) -> list[str]:
    """Flags for a few keys, with values of the right type or not."""
    found = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = any_key(rng)
        default = KEYS.get(key)
        value = any_word(rng) if rng.random() < 0.3 else mutations.number(rng)
        if isinstance(default, int) and isinstance(value, float):
            value = rng.choice((1, 2, 8, 16, 100, 1000, -1))
        found.append(f"--config.{key}={value}")
    return found
