"""Damage valid files in random ways."""

import json
import os
import pathlib
import random
import struct
from collections.abc import Callable
from typing import Any

_MARK = "deeply nested"
_NUMBERS = (-1, 0, 1, 2, 3, 7, 64, 65_537, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, 10**300)
_FLOATS = (0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"), -float("inf"))
_TEXTS = (
    "",
    " ",
    "\n",
    "x" * 100_000,
    "\0",
    "\ud800",
    "٣",
    "../neighbour",
    "/",
    "NaN",
    "true",
    "é",
)


def number(rng: random.Random) -> int | float:
    """Return a random number: small, huge, negative, NaN or infinite."""
    return rng.choice((*_NUMBERS, *_FLOATS))


def value(rng: random.Random) -> Any:
    """Return a random JSON value."""
    kind = rng.randrange(4)
    if kind == 0:
        return number(rng)
    if kind == 1:
        return rng.choice(_TEXTS)
    if kind == 2:
        return rng.choice((None, True, False, [], {}, [[]], {"": None}, [1, "a", None]))
    return f"{_MARK} {rng.choice((5, 60, 500, 990, 100_000))}"


def damage(rng: random.Random, path: pathlib.Path) -> str:
    """Damage a file in one of many ways; return a description."""
    choices: list[Callable[[random.Random, pathlib.Path], str]] = [_bytes, _bytes, _in_place]
    if path.suffix in (".json", ".jsonl"):
        choices += [_json] * 4
    if path.suffix == ".safetensors":
        choices += [_safetensors] * 4
    return f"{path.name}: {rng.choice(choices)(rng, path)}"


def _bytes(rng: random.Random, path: pathlib.Path) -> str:
    """Change the bytes of a file, whatever they mean."""
    content = bytearray(path.read_bytes())
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    how = rng.choice(
        ("cut", "flip", "noise", "delete", "double", "empty", "binary", "long line", "not UTF-8",
         "lines", "zeros", "mark")
    )  # fmt: skip
    if how == "cut":
        del content[start:]
    elif how == "flip":
        for _ in range(rng.choice((1, 1, 8, 64))):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "noise":
        content[start:start] = rng.randbytes(rng.randrange(1, 200))
    elif how == "delete":
        del content[start:stop]
    elif how == "double":
        content[start:start] = content[start:stop]
    elif how == "empty":
        content.clear()
    elif how == "binary":
        content[:] = rng.randbytes(rng.randrange(1, 5000))
    elif how == "long line":
        content[start:start] = b"x" * 2_000_000
    elif how == "not UTF-8":
        content[start:start] = rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88"))
    elif how == "lines":
        content[start:start] = rng.choice((b"\n", b"\r\n", b"\r", b"\0")) * rng.randrange(1, 5000)
    elif how == "zeros":
        content[start:stop] = bytes(stop - start)
    else:
        content[:0] = b"\xef\xbb\xbf"
    path.write_bytes(content)
    return how


def _in_place(rng: random.Random, path: pathlib.Path) -> str:
    """Replace the file by something else of the same name."""
    how = rng.choice(("missing", "folder", "dangling link", "loop", "pipe", "link"))
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "missing":
        path.symlink_to({"dangling link": "nowhere", "loop": path.name, "link": aside.name}[how])
    if how != "link":
        aside.unlink()
    return how


def _json(rng: random.Random, path: pathlib.Path) -> str:
    """Change, rename, add or remove a value anywhere in a JSON text or in a line of it."""
    try:
        lines = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
        place = rng.randrange(len(lines))
        tree = json.loads(lines[place])
    except (ValueError, RecursionError):  # damaged already, or an empty line
        return _bytes(rng, path)
    tree, description = change(rng, tree)
    lines[place] = dumps(tree)
    path.write_text("\n".join(lines))
    return description


def change(rng: random.Random, tree: Any) -> tuple[Any, str]:
    """Return a JSON value after one change anywhere within it, and a description."""
    places = _places(tree)
    if not places or rng.random() < 0.05:
        return value(rng), "another value of all"
    owner, key, where = rng.choice(places)
    how = rng.choice(("value", "value", "value", "delete", "rename", "more", "double"))
    if how == "delete":
        del owner[key]
    elif how == "rename" and isinstance(owner, dict):
        owner[f"{key}s"] = owner.pop(key)
    elif how == "more":
        if isinstance(owner, dict):
            owner["another"] = value(rng)
        else:
            owner.append(value(rng))
    elif how == "double" and isinstance(owner, list):
        owner.append(owner[key])
    else:
        owner[key] = new = value(rng)
        how = f"value {new!r:.40}"
    return tree, f"{where}: {how}"


def dumps(tree: Any) -> str:
    """Return JSON text, in which marks from `value` become deeply nested lists."""
    text = json.dumps(tree)
    for depth in (5, 60, 500, 990, 100_000):
        text = text.replace(f'"{_MARK} {depth}"', "[" * depth + "]" * depth)
    return text


def _places(tree: Any) -> list[tuple[Any, Any, str]]:
    """Return (container, key, path) of all places within a JSON value."""
    found, rest = [], [(tree, "")]
    while rest:  # without recursion: it may be nested deeply
        inner, where = rest.pop()
        items: list[tuple[Any, Any]] = []
        if isinstance(inner, dict):
            items = list(inner.items())
        elif isinstance(inner, list):
            items = list(enumerate(inner))
        found += [(inner, key, f"{where}/{key}") for key, _ in items]
        rest += [(value, f"{where}/{key}") for key, value in items]
    return found


def _safetensors(rng: random.Random, path: pathlib.Path) -> str:
    """Change the header, or only its length."""
    content = path.read_bytes()
    try:
        (length,) = struct.unpack("<Q", content[:8])
        tree = json.loads(content[8 : 8 + length])
    except (struct.error, ValueError, RecursionError):  # damaged already
        return _bytes(rng, path)
    if rng.random() < 0.2:
        wrong = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", wrong) + content[8:])
        return f"a header of {wrong} bytes"
    tree, description = change(rng, tree)
    header = dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    return f"header {description}"
