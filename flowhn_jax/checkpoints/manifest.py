"""Whether a checkpoint is complete and undamaged, by the hashes of its files."""

import json

import tensorstore

from flowhn_jax.checkpoints.files import COMMITTED, WrongCheckpointError, is_committed
from flowhn_jax.storage import AnyPath, Place, place
from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import one_line

_FILE = "manifest.json"
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's, written when all parts are
_KINDS = ("sha256", "crc32c")  # of checksums
_ARRAYS = ("params", "optimizer", "ema")  # groups of arrays in a checkpoint


def write(folder: AnyPath) -> None:
    """Write the hashes of all files of a complete checkpoint; a reader finds all or none.

    The files are on the disk before their hashes are.
    """
    folder = place(folder)
    folder.sync_tree()
    files = folder.checksums()
    (folder / _FILE).write_whole(json.dumps({folder.checksum_kind: files}, indent=1))


def is_written(folder: AnyPath) -> bool:
    """Return whether the checkpoint has hashes; a killed run may not have written them."""
    return (place(folder) / _FILE).is_file()


def damage(folder: AnyPath, parts: str | tuple[str, ...] = "") -> str | None:
    """Return what is wrong with a checkpoint's files whose names begin with `parts`; None: nothing.

    A checkpoint is complete if it has hashes, which are written last, or if Orbax's metadata says
    that it was committed and all parts that it names are there. Without hashes, arrays are only
    checked to be readable.
    """
    folder = place(folder)
    if not folder.is_dir():
        return "it is not a folder"
    if not is_committed(folder):
        return f"{COMMITTED} is missing, so the checkpoint was never completed"
    if name := folder.irregular():
        return f"{name} is not a file"
    if (folder / _FILE).is_dir():
        return f"{_FILE} is not a file"
    if not is_written(folder):
        if reason := _incomplete(folder):
            return reason
        # Not with Orbax, whose threads print tracebacks when an array cannot be read.
        groups = [name for name in _ARRAYS if f"{name}/".startswith(parts)]
        return next(filter(None, (_unreadable(folder / name) for name in groups)), None)
    try:
        content = json_text.loads((folder / _FILE).read(), _FILE)
        kind = next(each for each in _KINDS if each in content)
        files = content[kind]
        expected = {name: files[name] for name in files if name.startswith(parts)}
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return f"{_FILE} cannot be read"
    if _METADATA not in files or not any(name.startswith("params/") for name in files):
        return f"{_FILE} does not list the files of a checkpoint"
    found = folder.checksums(parts, kind)
    for name, checksum in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != checksum:
            return f"{name} has changed since it was written"
    return None


def _incomplete(folder: Place) -> str | None:
    """Return why a checkpoint without hashes is not complete; None: it is."""
    try:
        content = json_text.loads((folder / _METADATA).read(), _METADATA)
        has_timestamp = content["commit_timestamp_nsecs"] is not None
        parts = list(content["item_handlers"])
    except FileNotFoundError:
        return f"{_METADATA} is missing, so the checkpoint was never completed"
    except (ValueError, KeyError, TypeError):
        return f"{_METADATA} cannot be read"
    if not has_timestamp or "params" not in parts:
        return f"{_METADATA} does not record that the checkpoint was completed"
    missing = [part for part in parts if not _has_content(folder / part)]
    return f"{', '.join(missing)} is missing" if missing else None


def _has_content(part: Place) -> bool:
    """Return whether a part of a checkpoint has a file other than Orbax's mark of success."""
    return any(file.name != COMMITTED for _, file in part.walk())


def is_import(folder: AnyPath) -> bool:
    """Return whether a complete checkpoint holds parameters alone."""
    content = json_text.loads((place(folder) / _METADATA).read(), _METADATA)
    return list(content["item_handlers"]) == ["params"]


def check_not_import(folder: AnyPath) -> None:
    """Raise WrongCheckpointError for the checkpoint of an imported model, without an optimizer."""
    if is_import(folder):
        checkpoint = place(folder)
        workdir = checkpoint.parent.parent
        raise WrongCheckpointError(
            f"The checkpoint of step {checkpoint.name} in {str(workdir)!r} holds parameters alone, "
            "as that of an imported model does. To train from them, type "
            f"--config.train.init_from={workdir} and give another --workdir."
        )


def _unreadable(folder: Place) -> str | None:
    """Return why a group of arrays cannot be read; None: it can, or is absent."""
    spec = {"driver": "ocdbt", "base": folder.kvstore()}
    try:
        store = tensorstore.KvStore.open(spec).result()
        for key in store.list().result():
            store.read(key).result()
    except Exception as error:  # TensorStore raises several kinds
        return f"{folder.name} cannot be read: {one_line(error)}"
    return None
