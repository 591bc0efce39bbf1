"""Timing of what runs on a device."""

import time
from collections.abc import Callable
from typing import Any

import jax


def time_repeats(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, each until the device is done; one more goes before."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds
