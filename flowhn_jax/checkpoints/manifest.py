"""Whether a checkpoint is complete and undamaged, by the hashes of its files."""

import json
import pathlib

import tensorstore

from flowhn_jax.utils import json_text
from flowhn_jax.utils.files import sha256, sync_tree, write_atomically
from flowhn_jax.utils.text import one_line

_FILE = "manifest.json"
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's, written when all parts are
_MARK = "commit_success.txt"  # Orbax's, in each part
_ARRAYS = ("params", "optimizer")  # groups of arrays in a checkpoint


def write(folder: pathlib.Path) -> None:
    """Write the hashes of all files of a complete checkpoint; a reader finds all or none.

    The files are on the disk before their hashes are.
    """
    sync_tree(folder)
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    files = {str(file.relative_to(folder)): sha256(file) for file in found}
    write_atomically(folder / _FILE, json.dumps({"sha256": files}, indent=1))


def is_written(folder: pathlib.Path) -> bool:
    """Return whether the checkpoint has hashes; a killed run may not have written them."""
    return (folder / _FILE).is_file()


def damage(folder: pathlib.Path, parts: str | tuple[str, ...] = "") -> str | None:
    """Return what is wrong with a checkpoint's files whose names begin with `parts`; None: nothing.

    A checkpoint is complete if it has hashes, which are written last, or if Orbax's metadata says
    that it was committed and all parts that it names are there. Without hashes the check of an
    array is that it can be read.
    """
    if not folder.is_dir():
        return "it is not a folder"
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):  # such as a pipe, whose reading would never end
            return f"{path.relative_to(folder)} is not a file"
    if (folder / _FILE).is_dir():
        return f"{_FILE} is not a file"
    if not is_written(folder):
        if reason := _incomplete(folder):
            return reason
        # Not with Orbax, whose threads print tracebacks when an array cannot be read.
        groups = [name for name in _ARRAYS if f"{name}/".startswith(parts)]
        return next(filter(None, (_unreadable(folder / name) for name in groups)), None)
    try:
        files = json_text.loads((folder / _FILE).read_bytes(), _FILE)["sha256"]
        expected = {name: files[name] for name in files if name.startswith(parts)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_FILE} cannot be read"
    if _METADATA not in files or not any(name.startswith("params/") for name in files):
        return f"{_FILE} does not list the files of a checkpoint"
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} has changed since it was written"
    return None


def _incomplete(folder: pathlib.Path) -> str | None:
    """Return why a checkpoint without hashes is not complete; None: it is."""
    try:
        content = json_text.loads((folder / _METADATA).read_bytes(), _METADATA)
        is_committed = content["commit_timestamp_nsecs"] is not None
        parts = list(content["item_handlers"])
    except FileNotFoundError:
        return f"{_METADATA} is missing, so the checkpoint was never completed"
    except (ValueError, KeyError, TypeError):
        return f"{_METADATA} cannot be read"
    if not is_committed or "params" not in parts:
        return f"{_METADATA} does not record that the checkpoint was completed"
    missing = [part for part in parts if not _has_content(folder / part)]
    return f"{', '.join(missing)} is missing" if missing else None


def _has_content(part: pathlib.Path) -> bool:
    """Return whether a part of a checkpoint has a file other than Orbax's mark of success."""
    return any(path.is_file() and path.name != _MARK for path in part.rglob("*"))


def is_import(folder: pathlib.Path) -> bool:
    """Return whether a complete checkpoint holds parameters alone."""
    content = json_text.loads((folder / _METADATA).read_bytes(), _METADATA)
    return list(content["item_handlers"]) == ["params"]


def _unreadable(folder: pathlib.Path) -> str | None:
    """Return why a group of arrays cannot be read; None: it can, or is absent."""
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    try:
        store = tensorstore.KvStore.open(spec).result()
        for key in store.list().result():
            store.read(key).result()
    except Exception as error:  # TensorStore raises several kinds
        return f"{folder.name} cannot be read: {one_line(error)}"
    return None
