"""Timing of programs on a device, and of their compilation."""

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

_SAVED_EVENT = "/jax/compilation_cache/compile_time_saved_sec"


class _Saved(threading.local):
    """Seconds that the persistent compilation cache has saved this thread."""

    seconds = 0.0


_saved = _Saved()


@functools.cache
def _listen() -> None:
    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event == _SAVED_EVENT:
            _saved.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(on_duration)


def compile_timed(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """Return the compiled program, and the seconds that compiling it takes.

    For a program from JAX's persistent compilation cache, these are the seconds of the compilation
    that put it there, rounded down to whole seconds.
    """
    _listen()
    saved, start = _saved.seconds, time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - start + _saved.seconds - saved


def time_once(run: Callable[[], Any]) -> float:
    """Return the seconds of one call until the device is done."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def time_repeats(run: Callable[[], Any], repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` calls until the device is done, after a warm-up."""
    jax.block_until_ready(run())
    return [time_once(run) for _ in range(repeats)]
