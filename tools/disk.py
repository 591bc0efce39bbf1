"""Simulated full disks: a small tmpfs where mounting is allowed, else a limit on file sizes."""

import contextlib
import os
import pathlib
import resource
import shutil
import subprocess
from typing import Any

_SPACE = 32 * 2**20


class SmallDisk:
    """A tmpfs mounted on `folder` and filled by a file; a context manager."""

    def __init__(self, folder: pathlib.Path):
        """Mount the tmpfs.

        Raises:
          OSError: this process may not mount.
        """
        self.folder = folder
        self._ballast = folder / "ballast"
        command = ["mount", "-t", "tmpfs", "-o", f"size={_SPACE}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            raise OSError(f"cannot mount a tmpfs on {folder}: {mounted.stderr.strip()}")

    def __enter__(self) -> "SmallDisk":
        return self

    def __exit__(self, *_: Any) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def fill(self, pid: int, leave: int) -> None:
        """Fill the disk until `leave` bytes are free for all processes."""
        with self._ballast.open("wb") as file:
            size = shutil.disk_usage(self.folder).free - leave
            while size > 0:
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                    return
                except OSError:  # the trainer has written meanwhile
                    size = min(size, shutil.disk_usage(self.folder).free - leave)

    def free(self, pid: int) -> None:
        """Free the disk again."""
        self._ballast.unlink(missing_ok=True)


class FileLimit:
    """A folder on any disk, 'full' in that the trainer's files cannot grow beyond a size."""

    def __init__(self, folder: pathlib.Path):
        """Keep the folder; nothing has to be prepared."""
        self.folder = folder

    def __enter__(self) -> "FileLimit":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def fill(self, pid: int, leave: int) -> None:
        """Limit each file of the process to `leave` bytes."""
        self._limit(pid, leave)

    def free(self, pid: int) -> None:
        """Remove the limit."""
        self._limit(pid, resource.RLIM_INFINITY)

    @staticmethod
    def _limit(pid: int, size: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def open_disk(folder: pathlib.Path) -> SmallDisk | FileLimit:
    """Return a SmallDisk on the empty folder, or a FileLimit where mounting is not allowed."""
    try:
        return SmallDisk(folder)
    except OSError:
        return FileLimit(folder)
