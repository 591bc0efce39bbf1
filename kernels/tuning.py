"""Choosing how a kernel divides its work: by measurement on the device, once."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from kernels import device_cache

_log = logging.getLogger(__name__)

_SECTION = "tile"
_REPEATS = 5

Tile = tuple[int, ...]

# What this process has chosen: a cache folder that cannot be written costs no second measurement.
_chosen: dict[tuple[str, str], Tile] = {}
_measuring = threading.Lock()  # programs traced side by side must not time tiles at the same time


def choose_tile(
    operation: str,
    key: str,
    candidates: Sequence[Tile],
    default: Tile,
    program: Callable[[Tile], Callable],
    arguments: Sequence[jax.ShapeDtypeStruct],
) -> Tile:
    """Return the tile to use: the environment's, an earlier choice, or the quickest on the device.

    Measures only on a GPU and in a program of one process; otherwise the default is taken, so that
    all processes compile the same program. May be called while another function is traced.

    Args:
      operation: its name, as 'selective_scan'. `FLOWHN_SELECTIVE_SCAN_TILE=16,32` sets the tile.
      key: all that the choice depends on besides the kind of device: shapes, dtypes, versions.
      candidates: the tiles to measure.
      default: the tile where nothing is measured, or where no candidate runs.
      program: makes the function to time from a tile.
      arguments: shapes and dtypes of that function's arguments; it is timed on zeros.

    Raises:
      ValueError: if the environment's tile is not as many positive integers as the default.
    """
    variable = f"FLOWHN_{operation.upper()}_TILE"
    if variable in os.environ:
        return _parse(variable, os.environ[variable], len(default))
    device = jax.local_devices()[0]
    if jax.process_count() > 1 or device.platform != "gpu":
        return default
    entry = f"{operation} {key}"
    memo = device.device_kind, entry
    with _measuring:
        if memo not in _chosen:
            kept = device_cache.read(device.device_kind, _SECTION, entry)
            if isinstance(kept, list) and tuple(kept) in candidates:
                _chosen[memo] = tuple(kept)
            else:
                seconds = time_tiles(entry, candidates, program, arguments)
                quickest = min(seconds, key=seconds.get, default=None)
                if quickest is not None:
                    device_cache.write(device.device_kind, _SECTION, entry, quickest)
                _chosen[memo] = quickest or default
        return _chosen[memo]


def _parse(variable: str, text: str, length: int) -> Tile:
    try:
        tile = tuple(int(part) for part in text.split(","))
    except ValueError:
        tile = ()
    if len(tile) != length or min(tile) < 1:
        raise ValueError(f"{variable} must be {length} positive integers a,b,..., found {text!r}")
    return tile


def time_tiles(
    entry: str,
    candidates: Sequence[Tile],
    program: Callable[[Tile], Callable],
    arguments: Sequence[jax.ShapeDtypeStruct],
) -> dict[Tile, float]:
    """Return the seconds of each tile that runs; arguments as of `choose_tile`."""
    seconds = {}
    # In a thread of its own no trace, mesh or other context of the caller is active.
    with ThreadPoolExecutor(1) as thread:
        for tile in candidates:
            try:
                seconds[tile] = thread.submit(_time, program(tile), arguments).result()
            except Exception as error:  # a tile too large for the device fails in many ways
                _log.warning("%s: tile %s does not run: %s", entry, tile, error)
    _log.info("%s: seconds of each tile: %s", entry, seconds)
    return seconds


def _time(function: Callable, arguments: Sequence[jax.ShapeDtypeStruct]) -> float:
    """The quickest of a few runs, in seconds, without compilation."""
    compiled = jax.jit(function).lower(*arguments).compile()
    zeros = [jnp.zeros(x.shape, x.dtype) for x in arguments]
    jax.block_until_ready(compiled(*zeros))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*zeros))
        times.append(time.perf_counter() - start)
    return min(times)
