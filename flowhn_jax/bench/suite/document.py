"""suite.json: the results of a suite, saved after every row and complete at any moment."""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from flowhn_jax.bench.attempt import Row
from flowhn_jax.bench.suite import content_types
from flowhn_jax.report.table import to_json
from flowhn_jax.utils import json_text
from flowhn_jax.utils.sources import ROOT
from flowhn_jax.utils.text import short_path, short_repr

FILE = "suite.json"
_FORMAT = 1
# The same temporary name for all files of the folder, so that a kill leaves at most one of them.
_UNFINISHED = ".unfinished"


class Document:
    """The rows of a suite by part, in the order in which they were measured.

    Attributes:
      content: what suite.json holds: `format`, `code` (a hash of the sources), `machine` (what
        identifies the device and its software), `seconds` (of all runs together) and `parts`. A
        part has its `planned` keys, its `rows`, the `postponed` keys, which a hang or a deadline
        interrupted, and the reason if it `failed` as a whole.
    """

    def __init__(self, folder: pathlib.Path, content: dict[str, Any] | None = None):
        """Continue from the `content` of an earlier run; None if nothing is measured yet."""
        self._folder = folder
        self.content = content or {
            "format": _FORMAT,
            "code": code_hash(),
            "machine": None,
            "seconds": 0.0,
            "parts": {},
        }

    @classmethod
    def open(cls, folder: pathlib.Path) -> "Document":
        """Return the folder's document, a new one if it has none.

        Raises:
          ValueError: the folder's suite.json is damaged, or was measured with other code.
        """
        (folder / _UNFINISHED).unlink(missing_ok=True)
        if not (folder / FILE).exists():
            return cls(folder)
        content = read(folder)
        if content["code"] != code_hash():
            raise ValueError(
                f"--out must be a folder of this version's results, or a new one; the code of "
                f"{short_path(folder)} has the hash {short_repr(content['code'])}, this code "
                f"{code_hash()}. Give another --out."
            )
        for part in content["parts"].values():  # failed rows are tried again, after the others
            part["failed"] = None
            for row in part["rows"]:
                if "failed" in row:
                    row["partial"] = True
                    part["postponed"].append(row["key"])
        return cls(folder, content)

    def check_machine(self, machine: Row) -> None:
        """Record the machine; raise ValueError if the rows are of another one."""
        known = self.content["machine"]
        if known is None:
            self.content["machine"] = machine
            return
        for key, value in machine.items():
            if known.get(key) != value:
                raise ValueError(
                    f"--out must be a folder of this machine's results, or a new one; in "
                    f"{short_path(self._folder)} {key} is {short_repr(known.get(key))}, here it is "
                    f"{short_repr(value)}. Give another --out."
                )

    def part(self, name: str) -> dict[str, Any]:
        """Return the content of a part, which may be changed in place."""
        empty: dict[str, Any] = {"planned": None, "rows": [], "postponed": [], "failed": None}
        return self.content["parts"].setdefault(name, empty | {"seconds": 0.0})

    def add(self, name: str, row: Row) -> None:
        """Add a row to a part; it replaces an earlier row of the same key."""
        rows = self.part(name)["rows"]
        same = [i for i, each in enumerate(rows) if each["key"] == row["key"]]
        if same:
            rows[same[0]] = row
        else:
            rows.append(row)

    def missing(self, name: str) -> list[str] | None:
        """Return the keys still to measure, postponed ones last; None if nothing is planned yet."""
        part = self.part(name)
        if part["planned"] is None:
            return None
        done = {row["key"] for row in part["rows"] if not row.get("partial")}
        left = [key for key in part["planned"] if key not in done]
        return sorted(left, key=lambda key: key in part["postponed"])

    def rows(self) -> dict[str, list[Row]]:
        """Return the rows of all parts by the parts' names."""
        return {name: part["rows"] for name, part in self.content["parts"].items()}

    def save(self) -> None:
        """Write suite.json."""
        write(self._folder / FILE, (to_json(self.content, indent=1) + "\n").encode())


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Return the content of a folder's suite.json.

    Raises:
      FileNotFoundError: the folder has none.
      ValueError: it is damaged, or of another version.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"--compare takes folders with a {FILE}; {short_path(folder)} has none. Give the --out "
            "of a `bench suite` that has run."
        )
    name = short_path(path)
    content = json_text.loads(path.read_bytes(), name)
    try:
        content_types.check_content(content, _FORMAT)
    except ValueError as error:
        raise ValueError(
            f"{name} must hold a suite's results: {error}. Remove it, or give another --out."
        ) from error
    return content


def write(path: pathlib.Path, data: bytes) -> None:
    """Write a file of the suite's folder atomically."""
    if path.is_dir():
        raise ValueError(
            f"{short_path(path)} must be a file of the suite; found a folder. Remove it, or give "
            "another --out."
        )
    unfinished = path.with_name(_UNFINISHED)
    unfinished.unlink(missing_ok=True)  # it may be a link to something else
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


def code_hash(root: pathlib.Path = ROOT) -> str:
    """Return a hash, 12 hex digits, of the package's sources, the kernels' and the recipes'."""
    digest = hashlib.sha256()
    for path in _sources(root, ("flowhn_jax", "kernels", "configs")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _sources(root: pathlib.Path, packages: Sequence[str]) -> Iterable[pathlib.Path]:
    return sorted(path for package in packages for path in (root / package).rglob("*.py"))
