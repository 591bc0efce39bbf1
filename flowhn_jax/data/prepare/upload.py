"""A prepared set in a bucket: made on the local disk, then uploaded, index.json last.

A folder without index.json is no set. An upload that was interrupted leaves the object
`.unfinished` and the local set, from which the same command continues.
"""

import concurrent.futures
import contextlib
import hashlib
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence

from flowhn_jax.data.prepared import INDEX, TOKENIZER, PreparedSet
from flowhn_jax.storage import Place, place
from flowhn_jax.utils.lock import locked_folder
from flowhn_jax.utils.progress import Progress
from kernels import device_cache

_MARK = ".unfinished"
_THREADS = 4  # files that are written at the same time


@contextlib.contextmanager
def local_folder(out: Place, shard: tuple[int, int]) -> Iterator[pathlib.Path]:
    """Yield the folder in which a set for `out` is made, the same for each call with this shard.

    Only one process at a time has it; others wait.

    Raises:
      ValueError: the user has no home to make it in.
    """
    identity = str(out) if shard == (0, 1) else f"{out} {shard}"
    name = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
    try:
        folder = device_cache.folder() / "uploads" / name
    except RuntimeError as error:
        raise ValueError(
            f"the environment variable FLOWHN_CACHE_DIR must name a local folder in which the set "
            f"for {out} is made, as this user has no home ({error})."
        ) from error

    def report_waiting() -> None:
        print(f"Waiting for another process that prepares {out}.", file=sys.stderr)

    with locked_folder(folder, report_waiting):
        try:
            yield folder / "set"
        finally:
            with contextlib.suppress(OSError):  # a set is kept after an error
                folder.rmdir()


def is_unfinished(out: Place) -> bool:
    """Return whether `out` holds what an interrupted upload left, and no set."""
    return (out / _MARK).is_file() and not (out / INDEX).is_file()


def upload(made: PreparedSet, out: Place) -> None:
    """Upload a local set to `out`, in place of another set there, and remove it here.

    Objects that are there already with the same content are not sent again.

    Raises:
      OSError: an object cannot be written; the local set is kept.
      KeyboardInterrupt: Ctrl-C was pressed; the local set is kept.
    """
    folder = made.folder.local()
    try:
        _upload(folder, out)
    except OSError as error:
        error.add_note(f"The set is kept in {folder}; the same command continues the upload.")
        raise
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("interrupted; the same command continues the upload.") from error
    remove_traces(folder, out)


def remove_traces(folder: pathlib.Path, out: Place) -> None:
    """Remove the mark and the local set of an upload whose last object has arrived."""
    (out / _MARK).remove()
    shutil.rmtree(folder, ignore_errors=True)


def _upload(folder: pathlib.Path, out: Place) -> None:
    existing, made = out.checksums(), place(folder).checksums(kind=out.checksum_kind)
    (out / _MARK).write_whole("")
    (out / INDEX).remove()
    files = sorted(path for path in folder.iterdir() if path.name != INDEX)
    _remove_other(out, existing, [path.name for path in files])
    total = sum(path.stat().st_size for path in files)
    with (
        Progress(total, f"uploading to {out}", "bytes") as bar,
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
    ):

        def send(path: pathlib.Path) -> int:
            if existing.get(path.name) != made[path.name]:
                (out / path.name).copy_from(path)
            return path.stat().st_size

        try:
            for count in pool.map(send, files):
                bar.update(count)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    (out / INDEX).copy_from(folder / INDEX)


def _remove_other(out: Place, existing: dict[str, str], names: Sequence[str]) -> None:
    """Remove the files of an earlier set that the new one does not replace."""
    for name in existing:
        is_ours = "/" not in name and (name.endswith(".array_record") or name == TOKENIZER)
        if is_ours and name not in names:
            (out / name).remove()
