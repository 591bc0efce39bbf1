"""Choose how a kernel divides its work, by measuring once on each kind of device."""

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

# This process's choices, so that it measures once even if the cache folder cannot be written.
_chosen: dict[tuple[str, str], Tile] = {}
# Programs traced at the same time must not time tiles at the same time.
_measuring = threading.Lock()


def choose_tile(
    operation: str,
    key: str,
    candidates: Sequence[Tile],
    default: Tile,
    program: Callable[[Tile], Callable],
    arguments: Sequence[jax.ShapeDtypeStruct],
) -> Tile:
    """Return the tile to use: the environment's, an earlier choice, or the fastest on the device.

    Measures only on a GPU and in a program of one process; otherwise returns the default, so that
    all processes compile the same program. May be called while another function is traced.

    Args:
      operation: its name, as 'selective_scan'. `FLOWHN_SELECTIVE_SCAN_TILE=16,32,4` sets the tile.
      key: everything that the choice depends on besides the kind of device: shapes, dtypes,
        versions.
      candidates: the tiles to measure.
      default: the tile if nothing is measured or no candidate runs.
      program: makes the function to time from a tile.
      arguments: shapes and dtypes of that function's arguments; it is timed on zeros.

    Raises:
      ValueError: the environment's tile is not as many positive integers as the default.
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
                _chosen[memo] = min(seconds, key=lambda tile: seconds[tile], default=default)
                if seconds:
                    device_cache.write(device.device_kind, _SECTION, entry, _chosen[memo])
        return _chosen[memo]


def _parse(variable: str, text: str, length: int) -> Tile:
    try:
        tile = tuple(int(part) for part in text.split(","))
    except ValueError:
        tile = ()
    if len(tile) != length or min(tile) < 1:
        raise ValueError(
            f"{variable} must be {length} positive integers with commas between them; "
            f"got {text!r:.80}"
        )
    return tile


def time_tiles(
    entry: str,
    candidates: Sequence[Tile],
    program: Callable[[Tile], Callable],
    arguments: Sequence[jax.ShapeDtypeStruct],
) -> dict[Tile, float]:
    """Return the seconds of each tile that runs; for the arguments see `choose_tile`."""
    seconds = {}
    # In another thread, where no trace, mesh or other context of the caller is active.
    with ThreadPoolExecutor(1) as thread:
        for tile in candidates:
            try:
                seconds[tile] = thread.submit(_time, program(tile), arguments).result()
            except Exception as error:  # a tile too large for the device fails in many ways
                _log.warning("%s: tile %s does not run: %s", entry, tile, error)
    _log.info("%s: seconds of each tile: %s", entry, seconds)
    return seconds


def _time(function: Callable, arguments: Sequence[jax.ShapeDtypeStruct]) -> float:
    """Return the seconds of the fastest of a few runs, without compilation."""
    compiled = jax.jit(function).lower(*arguments).compile()
    zeros = [jnp.zeros(x.shape, x.dtype) for x in arguments]
    jax.block_until_ready(compiled(*zeros))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*zeros))
        times.append(time.perf_counter() - start)
    return min(times)
