"""The choice of a tile for the Triton kernels of a state-space scan, timed forward and backward."""

import importlib.metadata
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import Array

from kernels.scan_inputs import ScanInputs
from kernels.tuning import choose_tile

Tile = tuple[int, ...]


def choose_scan_tile(
    operation: str,
    inputs: ScanInputs,
    candidates: Sequence[Tile],
    default: Tile,
    scan_with: Callable[[Tile], Callable[[ScanInputs], Any]],
) -> Tile:
    """Return the tile of `kernels.tuning.choose_tile` for a scan's inputs.

    Args:
      operation: name of the scan.
      inputs: the inputs of the scan; only shapes and dtypes matter.
      candidates: the tiles to time.
      default: the tile where none can be timed.
      scan_with: the scan with a tile, for inputs.
    """
    shapes = [None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    described = ", ".join("-" if x is None else f"{x.dtype}{list(x.shape)}" for x in shapes)
    versions = [importlib.metadata.version(name) for name in ("jax", "jax-triton", "triton")]
    return choose_tile(
        operation,
        f"{described} {' '.join(versions)}",
        candidates,
        default,
        lambda tile: partial(forward_and_backward, scan_with(tile), shapes),
        [x for x in shapes if x is not None],
    )


def forward_and_backward(
    scan: Callable[[ScanInputs], Any], shapes: Sequence[Any], *arrays: Array
) -> list[Array]:
    """Return the gradients of a scan, the program by which tiles are timed.

    Args:
      scan: the scan with a tile.
      shapes: the shapes of its inputs, in order, None for those that are left out.
      *arrays: the inputs that are not None.
    """
    present = iter(arrays)
    inputs = ScanInputs._make(None if x is None else next(present) for x in shapes)
    outputs, vjp = jax.vjp(scan, inputs)
    gradients = jax.tree.leaves(vjp(outputs))
    return [g for g in gradients if g.dtype != jax.dtypes.float0]
