"""Files of the Hugging Face hub (hf://NAME/FILE, hf://datasets/NAME/FILE), which are only read."""

import contextlib
import io
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

from etils import epath

from flowhn_jax.storage.errors import StorageError
from flowhn_jax.storage.place import Place
from flowhn_jax.utils.text import one_line, short_path
from flowhn_jax.utils.wrapped_file import WrappedFile

T = TypeVar("T")

SCHEME = "hf://"
_BUFFER = 1 << 20  # bytes


class HubPlace(Place):
    """A file or a folder of a repository on the hub."""

    is_remote = True
    checksum_kind = "hub"

    def __init__(self, path: str):
        """Name a path without its scheme, e.g. 'gpt2/config.json'."""
        self._path = path

    @classmethod
    def parse(cls, text: str) -> "HubPlace":
        """Return the place of 'hf://NAME/FILE'.

        Raises:
          ValueError: the name is empty or contains '..'.
          ImportError: the package huggingface_hub is missing.
        """
        parts = [part for part in text.removeprefix(SCHEME).split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            raise ValueError(
                f"a path on the Hugging Face hub must be hf://NAME/FILE or hf://datasets/NAME/FILE "
                f"without '..'; got {short_path(text)}."
            )
        try:
            import huggingface_hub  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "hf:// needs the package 'huggingface_hub': pip install huggingface_hub"
            ) from error
        return cls("/".join(parts))

    def __str__(self) -> str:
        return f"{SCHEME}{self._path}"

    def __truediv__(self, name: str) -> "HubPlace":
        return HubPlace.parse(f"{self}/{name}")

    @property
    def name(self) -> str:
        """See Place."""
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> "HubPlace":
        """See Place."""
        return HubPlace(self._path.rpartition("/")[0])

    def local(self) -> pathlib.Path:
        """See Place."""
        raise ValueError(f"a local path is needed here; got {str(self)!r}.")

    def epath(self) -> epath.Path:
        """See Place."""
        return epath.Path(str(self))

    def kvstore(self) -> dict[str, str]:
        """See Place."""
        self._refuse_writing()

    def absolute(self) -> "HubPlace":
        """See Place."""
        return self

    def is_file(self) -> bool:
        """See Place."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """See Place."""
        return self._kind() == "directory"

    def _kind(self) -> str | None:
        """Return 'file', 'directory' or None."""
        try:
            return self._ask(lambda hub: hub.info(self._path)["type"])
        except FileNotFoundError:
            return None

    def size(self) -> int:
        """See Place."""
        return self._ask(lambda hub: hub.size(self._path))

    def read(self) -> bytes:
        """See Place."""
        return self._ask(lambda hub: hub.cat_file(self._path))

    def open(self) -> BinaryIO:
        """See Place."""
        file = self._ask(lambda hub: hub.open(self._path, "rb"))
        return cast(BinaryIO, io.BufferedReader(_Reader(self, file), _BUFFER))

    @contextlib.contextmanager
    def fetched(self) -> Iterator[pathlib.Path]:
        """See Place."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / self.name
            self._ask(lambda hub: hub.get_file(self._path, str(path)))
            yield path

    def children(self) -> list[Place]:
        """See Place."""
        try:
            found = self._ask(lambda hub: hub.ls(self._path, detail=False, refresh=True))
        except FileNotFoundError:
            return []
        return [HubPlace(path) for path in sorted(found) if path != self._path]

    def walk(self) -> Iterator[tuple[str, Place]]:
        """See Place."""
        for name in self.checksums():
            yield name, self / name

    def checksums(
        self, parts: str | tuple[str, ...] = "", kind: str | None = None
    ) -> dict[str, str]:
        """See Place; the only kind is the hub's own."""
        try:
            found = self._ask(lambda hub: hub.find(self._path, detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        names = {path[len(self._path) + 1 :]: info for path, info in sorted(found.items())}
        return {
            name: f"{info['size']}:{info.get('blob_id')}"
            for name, info in names.items()
            if name.startswith(parts)
        }

    def irregular(self) -> None:
        """See Place."""

    def write_whole(self, content: str | bytes) -> None:
        """See Place."""
        self._refuse_writing()

    def write(self, content: str | bytes) -> None:
        """See Place."""
        self._refuse_writing()

    def writing(self) -> contextlib.AbstractContextManager[pathlib.Path]:
        """See Place."""
        self._refuse_writing()

    def copy_from(self, source: pathlib.Path) -> None:
        """See Place."""
        self._refuse_writing()

    def sync(self) -> None:
        """See Place."""
        self._refuse_writing()

    def sync_tree(self) -> None:
        """See Place."""
        self._refuse_writing()

    def check_own_file(self) -> None:
        """See Place."""
        self._refuse_writing()

    def make_folder(self) -> None:
        """See Place."""
        self._refuse_writing()

    def rename(self, target: Place, mark: str) -> None:
        """See Place."""
        self._refuse_writing()

    def remove(self) -> None:
        """See Place."""
        self._refuse_writing()

    def remove_tree(self, mark: str | None = None) -> None:
        """See Place."""
        self._refuse_writing()

    def _refuse_writing(self) -> NoReturn:
        raise ValueError(f"the Hugging Face hub is only read; got {str(self)!r}.")

    def _ask(self, request: Callable[[Any], T]) -> T:
        """Return the answer to a request to the hub.

        Raises:
          StorageError: the hub does not answer it, also after the library's repetitions.
        """
        return answer(self, lambda: request(_hub()))


class _Reader(WrappedFile):
    """An open file of the hub, whose errors name it."""

    def __init__(self, place: HubPlace, file: Any):
        super().__init__(file)
        self._place = place

    def fetch(self, size: int) -> bytes:
        """Return at most `size` bytes from the position on; none at the end."""
        return answer(self._place, lambda: super(_Reader, self).fetch(size))


def _hub() -> Any:
    """Return the hub as a file system of fsspec."""
    import fsspec

    return fsspec.filesystem("hf")


def answer(place: HubPlace, request: Callable[[], T]) -> T:
    """Return the result of a request; raise StorageError, which names the place, if it fails."""
    try:
        return request()
    except FileNotFoundError:
        raise FileNotFoundError(f"{place} does not exist, or is not public.") from None
    except Exception as error:  # of the network, of the hub, of a name that it cannot have
        raise StorageError(f"reading {place} failed: {one_line(error)}") from error
