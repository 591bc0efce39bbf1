"""The process that touches the device: it runs parts on request and sends their rows.

It sends tuples: ("machine", row) once; then for each request ("plan", keys), ("row", row) for each
row, and finally ("done",) or ("failed", message).
"""

import contextlib
import ctypes
import importlib
import os
import pathlib
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from flowhn_jax.bench.attempt import Row, failure
from flowhn_jax.utils import cpu

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class Request(NamedTuple):
    """A part to run.

    Attributes:
      module: the module of the part.
      missing: keys to measure; None for all that the part plans.
      earlier: rows of all parts so far.
    """

    module: str
    missing: list[str] | None
    earlier: dict[str, list[Row]]


def serve(
    connection: Connection,
    environment: Mapping[str, str],
    log: str,
    cache: str,
    describes: str,
    prepares_memory: bool,
) -> None:
    """Run requests until the connection is closed.

    Args:
      connection: requests in, messages out.
      environment: variables to set before JAX starts.
      log: path of the file that standard output and error are appended to.
      cache: folder of the persistent compilation cache.
      describes: module whose `describe()` identifies the machine.
      prepares_memory: whether to allocate memory as train.py does on a CPU, which may slow down
        the compiler.
    """
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the supervisor, which decides
    os.environ.update(environment)
    _append_output_to(log)
    if prepares_memory:
        cpu.prepare_memory()
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send(("machine", importlib.import_module(describes).describe()))
        while True:
            _run(connection, connection.recv())


def _run(connection: Connection, request: Request) -> None:
    try:
        part = importlib.import_module(request.module)
        planned = part.plan()
        connection.send(("plan", planned))
        missing = planned if request.missing is None else request.missing
        for row in part.measure(missing, request.earlier):
            connection.send(("row", row))
        connection.send(("done",))
    except (EOFError, BrokenPipeError):
        raise
    except Exception as error:
        import traceback

        traceback.print_exc()
        connection.send(("failed", failure(error)))


def _append_output_to(log: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with pathlib.Path(log).open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _die_with_parent() -> None:
    """Ask the operating system to kill this process when the supervisor dies; Linux only."""
    if sys.platform == "linux":
        prctl: Any = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
