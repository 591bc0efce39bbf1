"""A copy of shards on the host's disk: random reads of a bucket are over a hundred times slower."""

import concurrent.futures
import errno
import hashlib
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from flowhn_jax.data.config import CACHE_AUTO, CACHE_OFF
from flowhn_jax.data.shards import Shard
from flowhn_jax.storage import Place
from flowhn_jax.utils.files import sha256, sync
from flowhn_jax.utils.lock import locked_folder
from flowhn_jax.utils.progress import Progress
from flowhn_jax.utils.text import short_path
from kernels import device_cache

_T = TypeVar("_T")

_BLOCK = 1 << 23  # bytes
_THREADS = 8  # shards that are read at the same time
_FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_folder(cache: str, folder: Place, fingerprint: str) -> pathlib.Path | None:
    """Return the local folder for the shards of a set; None: they are read where they are.

    Args:
      cache: `data.cache`.
      folder: the set.
      fingerprint: the fingerprint of the set; equal sets share a folder.

    Raises:
      ValueError: `cache` is 'auto', and the user has no home to keep the shards in.
    """
    if cache == CACHE_OFF or (cache == CACHE_AUTO and not folder.is_remote):
        return None
    if cache != CACHE_AUTO:
        return pathlib.Path(cache) / fingerprint
    try:
        return device_cache.folder() / "shards" / fingerprint
    except RuntimeError as error:
        raise ValueError(
            f"data.cache must be a folder for the shards of {folder}, as this user has no home "
            f"({error}); or type --config.data.cache=off to read without a copy."
        ) from error


def load(folder: Place, shards: Sequence[Shard], cache: pathlib.Path) -> None:
    """Copy shards into a local folder, unless it has them already.

    The size and SHA-256 of every shard are checked, of those that are there already too. Processes
    that need the same shards wait for the first one. A copy that was interrupted is made again.

    Args:
      folder: where the shards are.
      shards: the shards.
      cache: the local folder.

    Raises:
      ValueError: a shard in `folder` is damaged, or they do not fit on the disk.
      OSError: a shard cannot be read or written.
    """

    def report_waiting() -> None:
        print(f"Waiting for another process that copies {folder} to {cache}.", file=sys.stderr)

    with locked_folder(cache, report_waiting):
        _load(folder, shards, cache)


def _load(folder: Place, shards: Sequence[Shard], cache: pathlib.Path) -> None:
    """Copy shards as `load` does; the caller holds the lock of `cache`."""
    total = sum(shard.bytes for shard in shards)
    with Progress(total, f"loading {folder}", "bytes") as bar, _Workers() as workers:
        guard = threading.Lock()

        def on_bytes(count: int) -> None:
            with guard:
                bar.update(count)

        def is_intact(shard: Shard) -> bool:
            path = cache / shard.file
            found = path.is_file() and path.stat().st_size == shard.bytes
            found = found and sha256(path) == shard.sha256
            if found:
                on_bytes(shard.bytes)
            return found

        def copy(shard: Shard) -> None:
            _copy(folder / shard.file, shard, cache / shard.file, on_bytes, workers.is_stopped)

        intact = workers.map(is_intact, shards)
        missing = [shard for shard, is_good in zip(shards, intact, strict=True) if not is_good]
        _check_room(cache, folder, sum(shard.bytes for shard in missing))
        workers.map(copy, missing)


class _Workers:
    """Threads that end soon after an error or an interruption in any of them, or in the caller."""

    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "shards")
        self._stopped = threading.Event()
        self.is_stopped = self._stopped.is_set

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # First, so that no thread that stops begins another shard.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._stopped.set()
        self._pool.shutdown()

    def map(self, function: Callable[[Shard], _T], shards: Sequence[Shard]) -> list[_T]:
        """Return the results of a function for each shard, as soon as there are all or an error."""
        return list(self._pool.map(function, shards))


def _check_room(cache: pathlib.Path, folder: Place, needed: int) -> None:
    """Raise ValueError if the disk of `cache` lacks room for `needed` bytes."""
    lacking = needed - shutil.disk_usage(cache).free
    if lacking > 0:
        raise ValueError(
            f"data.cache must have room for the shards of {folder}; the disk of "
            f"{short_path(cache)} lacks {lacking / 1e6:,.0f} of {needed / 1e6:,.0f} MB. Free some, "
            "type --config.data.cache=FOLDER for a folder on another disk, or "
            "--config.data.cache=off to read without a copy."
        )


def _copy(
    source: Place,
    shard: Shard,
    target: pathlib.Path,
    on_bytes: Callable[[int], None],
    is_stopped: Callable[[], bool],
) -> None:
    """Copy a shard to `target`, which appears when its content is checked and on the disk."""
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)  # of a killed process
    digest = hashlib.sha256()
    try:
        with source.open() as remote, partial.open("xb") as file:
            while not is_stopped() and (block := remote.read(_BLOCK)):
                digest.update(block)
                file.write(block)
                on_bytes(len(block))
        if is_stopped():
            return
        if digest.hexdigest() != shard.sha256:
            raise ValueError(f"{source} is damaged: its SHA-256 has changed.")
        sync(partial)
        os.replace(partial, target)
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(error.errno, f"{error.strerror} for data.cache", str(target)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)
