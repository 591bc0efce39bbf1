"""The branches of FlowHN's blocks: decoder layers on some of a sequence's positions."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.attention import Attention
from flowhn_jax.layers.decoder import LAYOUT, DecoderLayer
from flowhn_jax.layers.mixer import SelectiveMixer
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.language_model import STREAM
from flowhn_jax.parallel.branch import Part, is_parallel, run_alone
from flowhn_jax.split import BlockPlan, Selection, count, take
from flowhn_jax.split.plan import EVERYTHING
from kernels.partition import constrain

Branch = DecoderLayer[Any]  # around a `SelectiveMixer`
BranchInputs = tuple[jax.Array, jax.Array | None]  # a branch's x [B, T, D] and segment_ids [B, T]
Options = dict[str, jax.Array]  # keyword arguments of a mixer
_ALL = EVERYTHING, EVERYTHING  # what the layer of a stem reads, and what it has outputs for


def take_tokens(
    x: jax.Array, segment_ids: jax.Array | None, selection: Selection
) -> tuple[jax.Array, jax.Array | None]:
    """Return the selected positions of x [B, T, D] and of segment_ids [B, T]."""
    if selection == EVERYTHING:
        return x, segment_ids
    return take(x, selection), None if segment_ids is None else take(segment_ids, selection)


def _positions(branch: Branch, selection: Selection, length: int) -> Options:
    """Return the option of a branch's mixer that holds its positions [T], if it rotates by them."""
    if not rotates(branch) or selection == EVERYTHING:
        return {}
    return {"positions": take(jnp.arange(length)[None], selection)[0]}


def rotates(branch: Branch) -> bool:
    """Return whether a branch needs the positions of its tokens."""
    return isinstance(branch.mixer, Attention) and branch.mixer.rope_theta is not None


def _selective(branch: Branch) -> SelectiveMixer[Any]:
    return cast("SelectiveMixer[Any]", branch.mixer)


def run_branch(
    branch: Branch, read: Selection, own: Selection, inputs: BranchInputs, *, length: int
) -> jax.Array:
    """Return a branch's output for its own positions of a sequence of `length`.

    Args:
      branch: the layer.
      read: the positions of the inputs: all, or `own`.
      own: the positions of the output.
      inputs: of the positions that the branch reads.
      length: tokens of the sequence.
    """
    x, segment_ids = inputs
    if not own.count(length):  # a short text may lie wholly within the other branch
        return x[:, :0]
    if read == own:
        return branch(x, segment_ids, **_positions(branch, own, length))
    x = constrain(x, LAYOUT)
    mixed = _selective(branch).mix_selected(branch.norm(x), segment_ids, own)
    return constrain(branch.add_mlp(take(x, own) + mixed), LAYOUT)


def branch_part(
    branch: Branch, read: Selection, own: Selection, inputs: BranchInputs, *, length: int
) -> Part:
    """Return `run_branch` as a function of arrays."""
    graph, params = nnx.split(branch)

    def run(params: nnx.State, inputs: BranchInputs) -> jax.Array:
        return run_branch(nnx.merge(graph, params), read, own, inputs, length=length)

    return Part(run, params, inputs, own.count(length))


def prefill_branch(
    branch: Branch, read: Selection, own: Selection, x: jax.Array, prompts: Prompts, length: int
) -> tuple[jax.Array, Any]:
    """Return a branch's output for its own positions of x [B, T, D], and its cache for `length`.

    `read` and `own` are as in `run_branch`.
    """
    room = max(1, read.count(length))
    if read != own:
        y, normed = take(x, own), branch.norm(x)
        if not y.shape[1]:
            return y, branch.mixer.prefill(normed, prompts, room)[1]
        mixed, cache = _selective(branch).prefill_selected(normed, prompts, room, own)
        return branch.add_mlp(y + mixed), cache
    options = _positions(branch, own, x.shape[1])
    if own != EVERYTHING:
        x, segment_ids = take_tokens(x, prompts.segment_ids, own)
        lengths, first = count(own, prompts.lengths), count(own, prompts.first)
        prompts = Prompts(lengths, first, segment_ids)
    if not x.shape[1]:
        return x, branch.init_cache(x.shape[0], room)
    return branch.prefill(x, prompts, room, **options)


class StemBlock(nnx.Module):
    """A block of one branch, for all tokens. Its methods are those of `Block`."""

    def __init__(self, layer: Branch):
        self.layer = layer

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None = None, *, plan: BlockPlan
    ) -> jax.Array:
        """Return the stream [B, T, D] after the block."""
        del plan
        inputs = x, segment_ids
        if is_parallel():
            x = run_alone(branch_part(self.layer, *_ALL, inputs, length=x.shape[1]))
        else:
            x = run_branch(self.layer, *_ALL, inputs, length=x.shape[1])
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
        x, cache = prefill_branch(self.layer, *_ALL, x, prompts, length)
        return constrain(x, STREAM), cache

    def step(
        self, x: jax.Array, plan: BlockPlan, positions: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Return the stream [B, D] of tokens at `positions` [B], and the layer's new cache."""
        del plan
        return self.layer.step(x, cache, **_step_positions(self.layer, positions))


def _step_positions(branch: Branch, positions: jax.Array) -> Options:
    return {"positions": positions} if rotates(branch) else {}


def step_branch(
    branch: Branch,
    x: jax.Array,
    cache: Any,
    active: jax.Array,
    positions: jax.Array,
    *,
    reads_all: bool,
) -> tuple[jax.Array, Any]:
    """Return a branch's step for the sequences that are `active` [B]; skip it where none is.

    With `reads_all` the cache takes the other sequences' tokens as well.
    """
    if reads_all:
        mix, new_cache = _selective(branch).read(branch.norm(x), cache)
        return jax.lax.cond(active.any(), lambda: branch.add_mlp(x + mix()), lambda: x), new_cache
    options = _step_positions(branch, positions)
    return jax.lax.cond(
        active.any(), lambda: branch.step(x, cache, active, **options), lambda: (x, cache)
    )
