"""A disk that can be filled: a small one in memory where that may be mounted, or else a limit."""

import contextlib
import os
import pathlib
import resource
import shutil
import subprocess
from typing import Any

_SPACE = 32 * 2**20


class SmallDisk:
    """A tmpfs on `folder`, filled by a file; use as a context manager."""

    def __init__(self, folder: pathlib.Path):
        """Mounts it; raises OSError where this process may not."""
        self.folder = folder
        self._ballast = folder / "ballast"
        command = ["mount", "-t", "tmpfs", "-o", f"size={_SPACE}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            raise OSError(f"{folder} cannot be mounted on: {mounted.stderr.strip()}.")

    def __enter__(self) -> "SmallDisk":
        return self

    def __exit__(self, *_: Any) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def fill(self, pid: int, leave: int) -> None:
        """Leaves so many bytes to all processes."""
        with self._ballast.open("wb") as file:
            size = shutil.disk_usage(self.folder).free - leave
            while size > 0:
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                    return
                except OSError:  # the trainer has taken some since
                    size = min(size, shutil.disk_usage(self.folder).free - leave)

    def free(self, pid: int) -> None:
        """Gives the bytes back."""
        self._ballast.unlink(missing_ok=True)


class FileLimit:
    """A folder of any disk; it is full in that the process's files cannot grow beyond a size."""

    def __init__(self, folder: pathlib.Path):
        """Nothing is to be prepared."""
        self.folder = folder

    def __enter__(self) -> "FileLimit":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def fill(self, pid: int, leave: int) -> None:
        """Leaves so many bytes to each of the process's files."""
        self._limit(pid, leave)

    def free(self, pid: int) -> None:
        """Takes the limit away."""
        self._limit(pid, resource.RLIM_INFINITY)

    @staticmethod
    def _limit(pid: int, size: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def open_disk(folder: pathlib.Path) -> SmallDisk | FileLimit:
    """The better one that can be had, on the empty folder."""
    try:
        return SmallDisk(folder)
    except OSError:
        return FileLimit(folder)
