"""How the C library allocates the memory of a process that runs JAX on a CPU."""

import ctypes
import os
import pathlib
import platform
import sys

# mallopt's parameters (glibc, malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8

# The setting by which glibc asks for huge pages, and the first version that has it.
_HUGE_PAGES, _FIRST_VERSION = "glibc.malloc.hugetlb", (2, 35)
_PROGRAMS = ("flowhn", "train.py", "eval.py")
_KERNEL_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def prepare_memory() -> None:
    """Make large blocks of memory cheap to allocate again: in huge pages, or by keeping them.

    It may restart the program, so a command calls it before it does anything else.

    XLA's CPU backend allocates its temporaries again in every step, 200 MB for a small model. glibc
    maps them each time, and the kernel clears them page by page, which takes about a quarter of the
    step unless the pages are huge ones (2 MiB). Where the kernel has these on request only, glibc
    requests them if GLIBC_TUNABLES asks for it when the process starts: a program of this package
    is replaced by itself with that variable, in the same process. In other processes, and with an
    older glibc, freed memory is kept instead. With another C library nothing changes.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    huge_pages = _huge_pages()
    if huge_pages == "on request" and _is_program_of_package():
        others = os.environ.get("GLIBC_TUNABLES")
        tunables = f"{others}:{_HUGE_PAGES}=1" if others else f"{_HUGE_PAGES}=1"
        sys.stdout.flush()
        sys.stderr.flush()
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {"GLIBC_TUNABLES": tunables})
    if huge_pages != "always":
        _keep_freed_memory()


def _huge_pages() -> str:
    """Return when glibc's large blocks have huge pages: 'always', 'on request' or 'never'."""
    try:
        setting = _KERNEL_SETTING.read_text()
    except OSError:
        return "never"
    if "[always]" in setting:
        return "always"
    version = tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2])
    if "[madvise]" not in setting or version < _FIRST_VERSION:
        return "never"
    for tunable in os.environ.get("GLIBC_TUNABLES", "").split(":"):
        name, _, value = tunable.partition("=")
        if name == _HUGE_PAGES:
            return "never" if value == "0" else "always"
    return "on request"


def _is_program_of_package() -> bool:
    """Return whether this process was started as train.py, eval.py, flowhn or by `python -m`."""
    arguments = sys.orig_argv[1:]
    if "-m" in arguments[:-1]:
        return arguments[arguments.index("-m") + 1].partition(".")[0] == "flowhn_jax"
    return sys.argv[0] in arguments and os.path.basename(sys.argv[0]) in _PROGRAMS


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory, up to 2 GiB, rather than return it to the kernel.

    XLA's temporaries come from its threads, whose own arenas hold no large block: hence a single
    arena, for which the threads of XLA's compiler wait for each other.
    """
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(_MMAP_THRESHOLD, 2**30):
        mallopt(_ARENA_MAX, 1)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 2**28)
