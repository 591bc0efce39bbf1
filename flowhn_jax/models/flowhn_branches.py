"""The branches of FlowHN's blocks: decoder layers on some of a sequence's positions."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.attention import Attention, KVCache
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import LAYOUT, DecoderLayer
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.mamba1 import Mamba1, Mamba1Cache
from flowhn_jax.layers.mamba2 import Mamba2, Mamba2Cache
from flowhn_jax.layers.mixer import SelectiveMixer
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.flowhn_config import FlowHNConfig
from flowhn_jax.models.language_model import STREAM
from flowhn_jax.parallel.branch import Part, is_parallel, run_alone
from flowhn_jax.split import BlockPlan, Selection, count, take
from flowhn_jax.split.plan import EVERYTHING
from kernels.partition import constrain

BranchMixer = Mamba1 | Mamba2 | Attention
BranchInputs = tuple[jax.Array, jax.Array | None]  # a branch's x [B, T, D] and segment_ids [B, T]
Options = dict[str, jax.Array]  # keyword arguments of a mixer
_ALL = EVERYTHING, EVERYTHING  # what the layer of a stem reads, and what it has outputs for


def take_tokens(x: jax.Array, segment_ids: jax.Array | None, selection: Selection) -> BranchInputs:
    """Return the selected positions of x [B, T, D] and of segment_ids [B, T]."""
    if selection == EVERYTHING:
        return x, segment_ids
    return take(x, selection), None if segment_ids is None else take(segment_ids, selection)


def branch_mixer(config: FlowHNConfig, name: str, context: LayerContext) -> BranchMixer:
    """Return the mixer of the branch 'ssm' or 'attention'."""
    if name == "attention":
        rope_theta = config.attention_rope_theta or None
        return Attention(config.attention_sizes, context, rope_theta=rope_theta)
    if config.is_mamba2:
        return Mamba2(config.mamba2_sizes, context)
    return Mamba1(config.mamba1_sizes, context)


class Branch(DecoderLayer[Any]):
    """A decoder layer on some positions of a sequence.

    In its methods `own` are the positions that it has outputs for, and `read` those that it reads:
    all, or `own`.
    """

    def __init__(self, config: FlowHNConfig, name: str, mixer: BranchMixer, context: LayerContext):
        super().__init__(mixer, config.width, config.branch_mlp_width(name), context)

    @property
    def rotates(self) -> bool:
        """Whether the mixer needs the positions of its tokens."""
        return isinstance(self.mixer, Attention) and self.mixer.rope_theta is not None

    @property
    def _selective(self) -> SelectiveMixer[Any]:
        return cast("SelectiveMixer[Any]", self.mixer)

    def run(
        self, read: Selection, own: Selection, inputs: BranchInputs, *, length: int
    ) -> jax.Array:
        """Return the output [B, count, D] for the own positions of a sequence of `length`.

        Args:
          read: positions that the branch reads.
          own: positions that it has outputs for.
          inputs: of the positions in `read`.
          length: tokens of the sequence.
        """
        x, segment_ids = inputs
        if not own.count(length):  # a short sequence may have no token in this branch
            return x[:, :0]
        if read == own:
            return self(x, segment_ids, **self._positions(own, length))
        x = constrain(x, LAYOUT)
        mixed = self._selective.mix_selected(self.norm(x), segment_ids, own)
        return constrain(self.add_mlp(take(x, own) + mixed), LAYOUT)

    def part(self, read: Selection, own: Selection, inputs: BranchInputs, *, length: int) -> Part:
        """Return `run` as a function of arrays."""
        graph, params = nnx.split(self)

        def run(params: nnx.State, inputs: BranchInputs) -> jax.Array:
            return nnx.merge(graph, params).run(read, own, inputs, length=length)

        return Part(run, params, inputs, own.count(length))

    def prefill_own(
        self, read: Selection, own: Selection, x: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, Any]:
        """Return the output for the own positions of x [B, T, D], and the branch's cache.

        The cache has room for the branch's share of `length` tokens.
        """
        room = max(1, read.count(length))
        if read != own:
            y, normed = take(x, own), self.norm(x)
            if not y.shape[1]:
                return y, self.mixer.prefill(normed, prompts, room)[1]
            mixed, cache = self._selective.prefill_selected(normed, prompts, room, own)
            return self.add_mlp(y + mixed), cache
        options = self._positions(own, x.shape[1])
        if own != EVERYTHING:
            x, segment_ids = take_tokens(x, prompts.segment_ids, own)
            lengths, first = count(own, prompts.lengths), count(own, prompts.first)
            prompts = Prompts(lengths, first, segment_ids)
        if not x.shape[1]:
            return x, self.init_cache(x.shape[0], room)
        return self.prefill(x, prompts, room, **options)

    def step_active(
        self,
        x: jax.Array,
        cache: Any,
        active: jax.Array,
        positions: jax.Array,
        *,
        reads_all: bool,
    ) -> tuple[jax.Array, Any]:
        """Return the stream [B, D] of one token per sequence, and the resulting cache.

        The output of a sequence that is not `active` [B] is undefined; if none is active, the
        branch is skipped. With `reads_all` the cache takes the other sequences' tokens as well.
        """
        if reads_all:
            mix, new_cache = self._selective.read(self.norm(x), cache)
            y = jax.lax.cond(active.any(), lambda: self.add_mlp(x + mix()), lambda: x)
            return y, new_cache
        options = self.step_options(positions)
        return jax.lax.cond(
            active.any(), lambda: self.step(x, cache, active, **options), lambda: (x, cache)
        )

    def step_options(self, positions: jax.Array) -> Options:
        """Return the mixer's options for tokens at `positions` [B]."""
        return {"positions": positions} if self.rotates else {}

    def _positions(self, selection: Selection, length: int) -> Options:
        """Return the mixer's option with the selected positions [T], if it rotates by them."""
        if not self.rotates or selection == EVERYTHING:
            return {}
        return {"positions": take(jnp.arange(length)[None], selection)[0]}


class BlockCache(NamedTuple):
    """The caches of both branches, each of the tokens that its branch reads."""

    ssm: Mamba1Cache | Mamba2Cache
    attention: KVCache


class ParallelBranches(nnx.Module):
    """An SSM branch and an attention branch in parallel, and the fusion of their outputs."""

    def __init__(self, config: FlowHNConfig, is_split: bool, context: LayerContext):
        width = config.width
        # The order of the random draws, mixers first, fixes the initial values of a seed.
        mixers = {name: branch_mixer(config, name, context) for name in ("ssm", "attention")}
        self.ssm = Branch(config, "ssm", mixers["ssm"], context)
        self.attention = Branch(config, "attention", mixers["attention"], context)
        self.has_projections = config.fusion == "paper"
        if self.has_projections:
            self.branch_proj = linear(width if is_split else 2 * width, width, context)
            self.norm = rms_norm(width, context)
            self.final_proj = linear(width, width, context)

    def fuse(self, x: jax.Array, joined: jax.Array) -> jax.Array:
        """Return the stream [..., D] after the block, for the stream x [..., D] before it."""
        if not self.has_projections:
            return joined
        x = x + self.branch_proj(joined)
        return x + self.final_proj(self.norm(x))


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
            x = run_alone(self.layer.part(*_ALL, inputs, length=x.shape[1]))
        else:
            x = self.layer.run(*_ALL, inputs, length=x.shape[1])
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
        x, cache = self.layer.prefill_own(*_ALL, x, prompts, length)
        return constrain(x, STREAM), cache

    def step(
        self, x: jax.Array, plan: BlockPlan, positions: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Return the stream [B, D] of tokens at `positions` [B], and the layer's new cache."""
        del plan
        return self.layer.step(x, cache, **self.layer.step_options(positions))
