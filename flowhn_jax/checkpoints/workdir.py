"""The folder of a run: its config, whether another config may continue it, and its lock."""

import contextlib
import dataclasses
import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import jax

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.checkpoints import free_space as disk
from flowhn_jax.config import Config, FlowHNConfig
from flowhn_jax.parallel.distributed import broadcast_from_first, is_first
from flowhn_jax.split.plan import with_fixed_share
from flowhn_jax.storage import LocalPlace, Lock, Place, lease, place
from flowhn_jax.utils import json_text
from flowhn_jax.utils.checks import require
from flowhn_jax.utils.lock import try_lock
from flowhn_jax.utils.progress import log

_FILE = "config.json"
_COMMANDS = "commands.txt"
_LOCK_FILE = "lock"
_MAX_NAMES = 8  # parameters in a message


def read_config(workdir: str) -> Config:
    """Return the config of the run in `workdir`.

    Raises:
      FileNotFoundError: `workdir` holds no run.
      ValueError: its config.json is damaged.
    """
    found = _read(workdir)
    try:
        return config_lib.parse(found)
    except ValueError as error:
        raise ValueError(f"{str(place(workdir) / _FILE)!r} is not valid: {error}") from error


def _read(workdir: str) -> dict[str, Any]:
    path = place(workdir) / _FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"--workdir must be the folder of a run; there is no {_FILE} in {workdir!r}."
        )
    try:
        return json_text.loads(path.read(), repr(str(path)))
    except ValueError:  # torn by a power cut
        kept = _config_of_checkpoint(path.parent)
        if kept is None:
            raise
    if is_first():
        print(
            f"{str(path)!r} is damaged; using the config in the newest checkpoint", file=sys.stderr
        )
    return kept


def _config_of_checkpoint(workdir: Place) -> dict[str, Any] | None:
    """Return the config in the newest checkpoint that has one, if any."""
    found = [each for each in (workdir / "checkpoints").children() if each.name.isdecimal()]
    for folder in sorted(found, key=lambda each: -int(each.name)):
        path = folder / "_CHECKPOINT_METADATA"
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            config = json_text.loads(path.read(), str(path))["custom_metadata"]["config"]
            if isinstance(config, dict):
                return config
    return None


def with_recorded_share(workdir: str | None, config: Config) -> Config:
    """Return `config` with split.balance='time' replaced by a share of the tokens, and print it.

    The share is that of the run in `workdir`, so that the run continues with its own model. Without
    a workdir, or if its balance is of another kind, it is the one measured on this device.
    """
    model = config.model
    if not isinstance(model, FlowHNConfig) or model.split.balance != "time":
        return config
    origin, split = "as measured", None
    if workdir is not None and (place(workdir) / _FILE).is_file():
        recorded = read_config(workdir).model
        balance = recorded.split.balance if isinstance(recorded, FlowHNConfig) else None
        if isinstance(balance, float):
            origin, split = f"as in {workdir}", dataclasses.replace(model.split, balance=balance)
    if split is None:
        split = with_fixed_share(model.split, model.dims, model.context)
    # Hosts measure different shares, but all must run the same program.
    split = dataclasses.replace(split, balance=broadcast_from_first(split.balance))
    if is_first():
        print(
            f"model.split.balance 'time', {origin}: {split.balance:.4f} of the tokens to attention"
        )
    return dataclasses.replace(config, model=dataclasses.replace(model, split=split))


def check_model(workdir: str, config: Config) -> None:
    """Raise ValueError if `config` describes another model than the one in `workdir`.

    The dtype of matrix products may differ, because parameters are float32 in any case.
    """
    _check_model(workdir, read_config(workdir), config)


def _check_model(workdir: str, recorded: Config, config: Config) -> None:
    old, new = (config_lib.to_dict(each.model) for each in (recorded, config))
    del old["dtype"], new["dtype"]
    if changes := config_lib.differences(old, new, "model."):
        there, here = (models.abstract_params(each.model) for each in (recorded, config))
        shapes = differences_of_shape(there, here)
        raise ValueError(
            f"{workdir!r} holds another model than --config: {'; '.join(changes)}"
            + (f"; therefore these parameters differ in shape: {shapes}. " if shapes else ". ")
            + "Give the config it was trained with, or another --workdir."
        )


def differences_of_shape(old: Any, new: Any) -> str:
    """Return names and shapes of the arrays whose shapes differ between two trees, as text."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in leaves
        }

    before, after = shapes(old), shapes(new)
    found = [
        f"{name} {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    more = f" and {len(found) - _MAX_NAMES} more" if len(found) > _MAX_NAMES else ""
    return ", ".join(found[:_MAX_NAMES]) + more


def make(workdir: str) -> None:
    """Create the folder of a run; raise ValueError if its name is taken by a file."""
    folder = place(workdir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--workdir must be a folder; {workdir!r} is a file.")
    folder.make_folder()


def check(workdir: str, config: Config) -> list[str]:
    """Check that `config` may continue the run that has checkpoints in `workdir`.

    The batches check that the data are the same when they are restored.

    Returns:
      The changes of the recipe since the run's last start, as 'key: old -> new'.

    Raises:
      ValueError: the workdir holds a run of another model, or with another optimizer.
    """
    recorded = read_config(workdir)
    _check_model(workdir, recorded, config)
    require(
        config.train.optimizer == recorded.train.optimizer,
        "train.optimizer",
        f"{recorded.train.optimizer!r}, whose state the checkpoints in {workdir!r} hold",
        config.train.optimizer,
    )
    return config_lib.differences(config_lib.to_dict(recorded), config_lib.to_dict(config))


def write_config(workdir: str, config: Config) -> None:
    """Write the config of the run in `workdir`, if it has changed."""
    path = place(workdir) / _FILE
    text = json.dumps(config_lib.to_dict(config), indent=2) + "\n"
    if not path.is_file() or path.read() != text.encode():
        path.write_whole(text)


def add_command(workdir: str, command: str | None) -> None:
    """Add a command line that trains the run to its commands.txt, unless it is there or None."""
    path, known = place(workdir) / _COMMANDS, read_commands(workdir)
    if command is not None and command not in known:
        path.write_whole("".join(f"{each}\n" for each in (*known, command)))


def read_commands(workdir: str) -> list[str]:
    """Return the command lines that trained the run in `workdir`, in their order."""
    path = place(workdir) / _COMMANDS
    return path.read_text().splitlines() if path.is_file() else []


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[Lock]:
    """Hold the lock of the workdir, so that one process trains in it at a time.

    Locally the lock is on the folder, and the system releases it when the process dies. The file
    `lock` only records who held it last, and may be removed. In a bucket the object `lock` is the
    lock, which expires when the process dies.

    Raises:
      ValueError: another process holds it; the message names its host and process id.
    """
    folder = place(workdir)
    if isinstance(folder, LocalPlace):
        with _locked_folder(workdir, folder):
            yield Lock()
        return
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(lease.held(folder / _LOCK_FILE, log))
        except lease.InUseError as error:
            raise _in_use(workdir, str(error)) from error
        yield lock


@contextlib.contextmanager
def _locked_folder(workdir: str, folder: LocalPlace) -> Iterator[None]:
    path = folder / _LOCK_FILE
    with try_lock(folder.local()) as is_free:
        if not is_free:
            raise _in_use(workdir, _lock_holder(path))
        try:
            holder = {"host": socket.gethostname(), "pid": os.getpid()}
            path.write_whole(json.dumps(holder))
        except OSError as error:  # the lock is held without the file, too
            if not disk.is_full(error):
                raise
        yield


def _in_use(workdir: str, holder: str) -> ValueError:
    return ValueError(
        f"--workdir {workdir!r} is in use by {holder}; wait for it, stop it, or give another "
        "--workdir."
    )


def _lock_holder(path: Place) -> str:
    """Return the process that the file names, in words."""
    holder = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        holder = json.loads(path.read())  # unless it was removed, or is about to be written
    return lease.describe(holder)
