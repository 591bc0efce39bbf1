"""The branches of FlowHN's blocks: decoder layers on some of a sequence's positions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.attention import Attention
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.layers.mixer import CacheT
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.language_model import STREAM
from flowhn_jax.parallel.branch import Part, is_parallel, run_alone
from flowhn_jax.split import BlockPlan, Selection, count, take
from flowhn_jax.split.plan import EVERYTHING
from kernels.partition import constrain

BranchInputs = tuple[jax.Array, jax.Array | None]  # a branch's x [B, T, D] and segment_ids [B, T]
Options = dict[str, jax.Array]  # keyword arguments of a mixer


def take_tokens(
    x: jax.Array, segment_ids: jax.Array | None, selection: Selection
) -> tuple[jax.Array, jax.Array | None]:
    """Return the selected positions of x [B, T, D] and of segment_ids [B, T]."""
    if selection == EVERYTHING:
        return x, segment_ids
    return take(x, selection), None if segment_ids is None else take(segment_ids, selection)


def _positions(branch: DecoderLayer[Any], selection: Selection, length: int) -> Options:
    """Return the option of a branch's mixer that holds its positions [T], if it rotates by them."""
    if not _rotates(branch) or selection == EVERYTHING:
        return {}
    return {"positions": take(jnp.arange(length)[None], selection)[0]}


def _rotates(branch: DecoderLayer[Any]) -> bool:
    return isinstance(branch.mixer, Attention) and branch.mixer.rope_theta is not None


def run_branch(
    branch: DecoderLayer[Any], selection: Selection, inputs: BranchInputs, *, length: int
) -> jax.Array:
    """Return a branch's output for its positions of a sequence of `length`."""
    x, segment_ids = inputs
    if not x.shape[1]:  # a short text may lie wholly within the other branch
        return x
    return branch(x, segment_ids, **_positions(branch, selection, length))


def branch_part(
    branch: DecoderLayer[Any], selection: Selection, inputs: BranchInputs, *, length: int
) -> Part:
    """Return `run_branch` as a function of arrays."""
    graph, params = nnx.split(branch)

    def run(params: nnx.State, inputs: BranchInputs) -> jax.Array:
        return run_branch(nnx.merge(graph, params), selection, inputs, length=length)

    return Part(run, params, inputs)


def prefill_branch(
    branch: DecoderLayer[CacheT],
    x: jax.Array,
    selection: Selection,
    prompts: Prompts,
    length: int,
) -> tuple[jax.Array, CacheT]:
    """Return a branch's output for its positions of x [B, T, D], and its cache for `length`."""
    options = _positions(branch, selection, x.shape[1])
    if selection != EVERYTHING:
        x, segment_ids = take_tokens(x, prompts.segment_ids, selection)
        lengths, first = count(selection, prompts.lengths), count(selection, prompts.first)
        prompts = Prompts(lengths, first, segment_ids)
    room = max(1, selection.count(length))
    if not x.shape[1]:  # a short prompt may lie wholly within the other branch
        return x, branch.init_cache(x.shape[0], room)
    return branch.prefill(x, prompts, room, **options)


class StemBlock(nnx.Module):
    """A block of one branch, for all tokens. Its methods are those of `Block`."""

    def __init__(self, layer: DecoderLayer[Any]):
        self.layer = layer

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None = None, *, plan: BlockPlan
    ) -> jax.Array:
        """Return the stream [B, T, D] after the block."""
        del plan
        inputs = x, segment_ids
        if is_parallel():
            x = run_alone(branch_part(self.layer, EVERYTHING, inputs, length=x.shape[1]))
        else:
            x = run_branch(self.layer, EVERYTHING, inputs, length=x.shape[1])
        return constrain(x, STREAM)

    def init_cache(self, batch: int, plan: BlockPlan, length: int) -> Any:
        """Return the layer's cache before the first of `length` tokens."""
        del plan
        return self.layer.init_cache(batch, length)

    def prefill(
        self, x: jax.Array, plan: BlockPlan, prompts: Prompts, length: int
    ) -> tuple[jax.Array, Any]:
        """Return the stream [B, T, D] and the layer's cache after each row, for `length` tokens."""
        del plan
        x, cache = prefill_branch(self.layer, x, EVERYTHING, prompts, length)
        return constrain(x, STREAM), cache

    def step(
        self, x: jax.Array, plan: BlockPlan, positions: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Return the stream [B, D] of tokens at `positions` [B], and the layer's new cache."""
        del plan
        return self.layer.step(x, cache, **_step_positions(self.layer, positions))


def _step_positions(branch: DecoderLayer[Any], positions: jax.Array) -> Options:
    return {"positions": positions} if _rotates(branch) else {}


def step_branch(
    branch: DecoderLayer[Any],
    x: jax.Array,
    cache: Any,
    active: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, Any]:
    """Return a branch's step for the sequences that are `active` [B]; skip it where none is."""
    options = _step_positions(branch, positions)
    return jax.lax.cond(
        active.any(), lambda: branch.step(x, cache, active, **options), lambda: (x, cache)
    )
