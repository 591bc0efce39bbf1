"""Compilation in the background, so that a request to stop does not wait for it."""

import threading
from collections.abc import Callable
from typing import Any

import jax

from flowhn_jax.parallel.distributed import any_process

_THREAD = "compilation"
_SECONDS_BETWEEN_POLLS = 0.2


def compile_unless(
    should_stop: Callable[[], bool], lowered: jax.stages.Lowered
) -> jax.stages.Compiled | None:
    """Return the compiled program; all processes of a run must call it.

    Args:
      should_stop: whether this process is to stop, asked repeatedly while the program compiles.
      lowered: what to compile.

    Returns:
      The compiled program; None if some process is to stop first. Compilation then continues to its
      end in the background; see `is_compiling`.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(lowered.compile())
        except BaseException as error:
            outcome.append(error)

    # A daemon thread: the process can exit before it ends.
    thread = threading.Thread(target=work, name=_THREAD, daemon=True)
    thread.start()
    while True:
        thread.join(_SECONDS_BETWEEN_POLLS)
        if any_process(should_stop()):
            return None
        if not any_process(thread.is_alive()):
            break
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def is_compiling() -> bool:
    """Return whether an abandoned compilation still runs, which must not delay the exit."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
