"""Compiles in the background, so that a request to stop need not wait for it."""

import threading
from collections.abc import Callable
from typing import Any

import jax

from flowhn_jax.parallel.distributed import any_process

_THREAD = "compilation"
_SECONDS_BETWEEN_LOOKS = 0.2


def compile_unless(
    stops: Callable[[], bool], lowered: jax.stages.Lowered
) -> jax.stages.Compiled | None:
    """Compiles; all processes of a run must call it.

    Args:
      stops: whether to stop; looked at all the while.
      lowered: what to compile.

    Returns:
      What was compiled; None where some process is to stop. Then the compilation still goes on
      (`is_going_on`), and does so to its end.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(lowered.compile())
        except BaseException as error:
            outcome.append(error)

    # A daemon, for which the end of the process does not wait.
    thread = threading.Thread(target=work, name=_THREAD, daemon=True)
    thread.start()
    while True:
        thread.join(_SECONDS_BETWEEN_LOOKS)
        if any_process(stops()):
            return None
        if not any_process(thread.is_alive()):
            break
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def is_going_on() -> bool:
    """Whether a compilation that was broken off still runs: the process must end without it."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
