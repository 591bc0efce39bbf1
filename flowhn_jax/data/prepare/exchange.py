"""Exchange: shards of one preparation on several hosts, which share nothing but a bucket."""

import concurrent.futures
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flowhn_jax.data.prepare.parts import COMPLETE
from flowhn_jax.storage import Place, place
from flowhn_jax.utils.files import write_atomically
from flowhn_jax.utils.progress import progress

_THREADS = 8  # files that are copied at the same time

T = TypeVar("T", pathlib.Path, str)


class Exchange:
    """The parts of all shards in a bucket, next to the set; a shard's are there when complete."""

    def __init__(self, out: Place, count: int):
        """Name the folders of `count` shards for the set `out`."""
        self._folders = [out.parent / f".{out.name}.parts-{i}-of-{count}" for i in range(count)]

    def has(self, index: int) -> bool:
        """Return whether all parts of a shard are in the bucket."""
        return (self._folders[index] / COMPLETE).is_file()

    def send(self, index: int, folder: pathlib.Path) -> None:
        """Upload the complete parts of a shard, except those that are there already."""
        target = self._folders[index]
        existing = target.checksums()
        made = place(folder).checksums(kind=target.checksum_kind)
        missing = [folder / name for name in sorted(made) if made[name] != existing.get(name)]
        last = folder / COMPLETE
        _for_each(
            lambda path: (target / path.name).copy_from(path),
            [path for path in missing if path != last],
            f"uploading to {target}",
        )
        if last in missing:
            (target / COMPLETE).copy_from(last)

    def fetch(self, folders: Sequence[pathlib.Path]) -> None:
        """Copy the shards that are complete in the bucket to local folders.

        Raises:
          FileNotFoundError: the parts are being removed, because there is a set.
        """
        for index, folder in enumerate(folders):
            if self.has(index) and not (folder / COMPLETE).is_file():
                self._fetch(self._folders[index], folder)

    def _fetch(self, source: Place, folder: pathlib.Path) -> None:
        folder.mkdir(exist_ok=True)
        names = [name for name, _ in source.walk() if name != COMPLETE]
        _for_each(
            lambda name: write_atomically(folder / name, (source / name).read()),
            names,
            f"loading {source}",
        )
        write_atomically(folder / COMPLETE, (source / COMPLETE).read())

    def remove(self) -> None:
        """Remove the parts of all shards from the bucket."""
        for folder in self._folders:
            folder.remove_tree(COMPLETE)


def _for_each(function: Callable[[T], Any], items: Sequence[T], description: str) -> None:
    """Call a function for each file in several threads, and show the progress."""
    with (
        progress(len(items), description, "files") as bar,
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
    ):
        try:
            for _ in pool.map(function, items):
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
