"""Whether a checkpoint is complete, and the content hashes by which damage is found."""

import json
import pathlib

import tensorstore

from flowhn_jax.data.shards import sha256
from flowhn_jax.utils import json_text
from flowhn_jax.utils.files import sync_tree, whole_file
from flowhn_jax.utils.text import one_line

_FILE = "manifest.json"
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's, written when all parts are
_ARRAYS = ("params", "optimizer")  # groups of arrays in a checkpoint


def write(folder: pathlib.Path) -> None:
    """Hash all files of a checkpoint that is complete; a reader finds all hashes or none.

    Whatever they stand for is on the disk before they are.
    """
    sync_tree(folder)
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    files = {str(file.relative_to(folder)): sha256(file) for file in found}
    with whole_file(folder / _FILE) as temporary:
        temporary.write_text(json.dumps({"sha256": files}, indent=1))


def is_written(folder: pathlib.Path) -> bool:
    """Whether the checkpoint has hashes: its run may have been killed before it had."""
    return (folder / _FILE).is_file()


def damage(folder: pathlib.Path, parts: str | tuple[str, ...] = "") -> str | None:
    """Return what is wrong with the files of a checkpoint whose names begin with one of `parts`.

    None: nothing. A checkpoint counts by what says that it was committed: its hashes, which are
    written last, or Orbax's metadata with all the parts that they name. Where there are no hashes,
    arrays are only tried to be read.
    """
    if not folder.is_dir():
        return "it is no folder"
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):  # a pipe, say, of which reading never ends
            return f"{path.relative_to(folder)} is no file"
    if (folder / _FILE).is_dir():
        return f"{_FILE} is no file"
    if not is_written(folder):
        if reason := _incomplete(folder):
            return reason
        # Orbax would leave its threads with a closed event loop, of which they complain at length.
        groups = [name for name in _ARRAYS if f"{name}/".startswith(parts)]
        return next(filter(None, (_unreadable(folder / name) for name in groups)), None)
    try:
        files = json_text.loads((folder / _FILE).read_bytes(), _FILE)["sha256"]
        expected = {name: files[name] for name in files if name.startswith(parts)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_FILE} is not readable"
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is not what was written"
    return None


def _incomplete(folder: pathlib.Path) -> str | None:
    """Return why a checkpoint without hashes cannot have been committed; None: it may have."""
    try:
        content = json_text.loads((folder / _METADATA).read_bytes(), _METADATA)
        is_committed = content["commit_timestamp_nsecs"] is not None
        parts = list(content["item_handlers"])
    except FileNotFoundError:
        return f"{_METADATA} is missing, so it was never completed"
    except (ValueError, KeyError, TypeError):
        return f"{_METADATA} is not readable"
    if not is_committed or "params" not in parts:
        return f"{_METADATA} does not say that it was completed"
    missing = [part for part in parts if not (folder / part).exists()]
    return f"{', '.join(missing)} is missing" if missing else None


def is_import(folder: pathlib.Path) -> bool:
    """Whether a complete checkpoint was made of parameters alone."""
    content = json_text.loads((folder / _METADATA).read_bytes(), _METADATA)
    return list(content["item_handlers"]) == ["params"]


def _unreadable(folder: pathlib.Path) -> str | None:
    """Why a group of arrays, in TensorStore's OCDBT, cannot be read; None: it can, or is absent."""
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    try:
        store = tensorstore.KvStore.open(spec).result()
        for key in store.list().result():
            store.read(key).result()
    except Exception as error:  # TensorStore's are of several kinds
        return f"{folder.name} cannot be read: {one_line(error)}"
    return None
