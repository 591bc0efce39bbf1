"""Take a branch's tokens out of a sequence, and merge the branches' outputs back.

A selection is a few runs per period, so both are slices, reshapes and concatenations without gather
or scatter, and their transposes are pads and slices.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flowhn_jax.split.plan import BlockPlan
from flowhn_jax.split.selection import Selection


def _clip(selection: Selection, length: int) -> list[tuple[int, int]]:
    """Return the runs of one period, cut off at `length`."""
    return [(start, min(stop, length)) for start, stop in selection.runs if start < length]


def _slice(x: jax.Array, start: int, stop: int, axis: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, start, stop, axis=axis)


def _concatenate(pieces: list[jax.Array], axis: int) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)


def take(x: jax.Array, selection: Selection) -> jax.Array:
    """Return the selected positions of x [B, T, ...] in order: [B, selection.count(T), ...]."""
    batch, length, *rest = x.shape
    periods, tail = divmod(length, selection.period)
    whole = periods * selection.period
    pieces = [_slice(x, whole + a, whole + b, 1) for a, b in _clip(selection, tail)]
    if periods:
        folded = _slice(x, 0, whole, 1).reshape(batch, periods, selection.period, *rest)
        runs = [_slice(folded, start, stop, 2) for start, stop in selection.runs]
        runs = runs or [_slice(folded, 0, 0, 2)]
        unfolded = _concatenate(runs, 2).reshape(batch, periods * selection.width, *rest)
        pieces.insert(0, unfolded)
    return _concatenate(pieces or [_slice(x, 0, 0, 1)], 1)


def contains(selection: Selection, positions: jax.Array) -> jax.Array:
    """Return which of `positions` [...] are selected: bool [...]."""
    phase = positions % selection.period
    inside = [(start <= phase) & (phase < stop) for start, stop in selection.runs]
    return functools.reduce(jnp.logical_or, inside, jnp.zeros(positions.shape, bool))


def count(selection: Selection, lengths: jax.Array) -> jax.Array:
    """Return the number of selected positions below each of `lengths` [...]: int32 [...]."""
    periods, tail = jnp.divmod(lengths, selection.period)
    in_tail = (jnp.clip(tail - start, 0, stop - start) for start, stop in selection.runs)
    return (periods * selection.width + sum(in_tail)).astype(jnp.int32)


def _interleave(
    branches: Sequence[jax.Array], plan: BlockPlan, length: int, axis: int
) -> jax.Array:
    """Join both branches' outputs in order of position, for one period cut off at `length`."""
    runs = [(run, 0) for run in _clip(plan.attention, length)]
    runs += [(run, 1) for run in _clip(plan.ssm, length)]
    used = [0, 0]
    pieces = []
    for (start, stop), branch in sorted(runs):
        offset = used[branch]
        used[branch] += stop - start
        pieces.append(_slice(branches[branch], offset, used[branch], axis))
    return _concatenate(pieces, axis)


def merge(attention: jax.Array, ssm: jax.Array, plan: BlockPlan) -> jax.Array:
    """Undo `take`: return [B, Ta, ...] and [B, Ts, ...] in order of position, [B, Ta + Ts, ...]."""
    batch, _, *rest = attention.shape
    period = plan.attention.period
    periods, tail = divmod(attention.shape[1] + ssm.shape[1], period)
    branches = ((attention, plan.attention.width), (ssm, plan.ssm.width))
    pieces = []
    if periods:
        folded = tuple(
            _slice(x, 0, periods * width, 1).reshape(batch, periods, width, *rest)
            for x, width in branches
        )
        merged = _interleave(folded, plan, period, axis=2)
        pieces.append(merged.reshape(batch, periods * period, *rest))
    if tail:
        ends = tuple(_slice(x, periods * width, x.shape[1], 1) for x, width in branches)
        pieces.append(_interleave(ends, plan, tail, axis=1))
    return _concatenate(pieces, 1)
