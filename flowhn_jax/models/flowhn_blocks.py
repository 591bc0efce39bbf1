"""FlowHN's blocks: an SSM branch and an attention branch, each on some of the positions."""

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
from flowhn_jax.parallel.branch import Part, is_parallel, run_alone, side_by_side
from flowhn_jax.split import BlockPlan, Selection, contains, count, merge, take
from flowhn_jax.split.plan import EVERYTHING
from kernels.partition import constrain

BranchMixer = Mamba1 | Mamba2 | Attention
Options = dict[str, jax.Array]  # keyword arguments of a mixer
_ALL = EVERYTHING, EVERYTHING  # what the layer of a stem reads, and what it has outputs for


class BranchInputs(NamedTuple):
    """The tokens that a branch reads.

    Attributes:
      x: [B, T, D].
      segment_ids: [B, T] int32, or None.
      options: keyword arguments of the mixer.
    """

    x: jax.Array
    segment_ids: jax.Array | None
    options: Options


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

    def take(
        self, x: jax.Array, segment_ids: jax.Array | None, selection: Selection
    ) -> BranchInputs:
        """Return the selected positions of x [B, T, D] and segment_ids [B, T] as inputs."""
        if selection == EVERYTHING:
            return BranchInputs(x, segment_ids, {})
        ids = None if segment_ids is None else take(segment_ids, selection)
        options = {}
        if self.rotates:
            options["positions"] = take(jnp.arange(x.shape[1])[None], selection)[0]
        return BranchInputs(take(x, selection), ids, options)

    def run(self, inputs: BranchInputs, own: Selection | None = None) -> jax.Array:
        """Return the output [B, count, D] for the `own` positions of the inputs; None: for all."""
        if not _count(inputs, own):  # a short sequence may have no token in this branch
            return inputs.x[:, :0]
        x = constrain(inputs.x, LAYOUT)
        normed = self.norm(x)
        if own is None:
            mixed = self.mixer(normed, inputs.segment_ids, **inputs.options)
        else:
            mixed = self._selective.mix_selected(normed, inputs.segment_ids, own)
            x = take(x, own)
        return constrain(self.add_mlp(x + mixed), LAYOUT)

    def part(self, inputs: BranchInputs, own: Selection | None = None) -> Part:
        """Return `run` as a function of arrays."""
        graph, params = nnx.split(self)

        def run(params: nnx.State, inputs: BranchInputs) -> jax.Array:
            return nnx.merge(graph, params).run(inputs, own)

        return Part(run, params, inputs, _count(inputs, own))

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
        x, segment_ids, options = self.take(x, prompts.segment_ids, own)
        if own != EVERYTHING:
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


def _count(inputs: BranchInputs, own: Selection | None) -> int:
    """Return the number of positions that a branch has outputs for, as in `Branch.run`."""
    length = inputs.x.shape[1]
    return length if own is None else own.count(length)


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


class Block(ParallelBranches):
    """Branches that share the tokens by their positions, or that both get all tokens."""

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None = None, *, plan: BlockPlan
    ) -> jax.Array:
        """Return the stream [B, T, D] after the block.

        Args:
          x: [B, T, D].
          segment_ids: [B, T] int32; documents never attend to each other. None: one document.
          plan: which positions each branch gets.
        """
        reads_of_attention, reads_of_ssm = plan.reads
        of_ssm = self.ssm.take(x, segment_ids, reads_of_ssm)
        of_attention = self.attention.take(x, segment_ids, reads_of_attention)
        own = (plan.ssm, plan.attention) if plan.reads_all else (None, None)
        if is_parallel():
            parts = self.ssm.part(of_ssm, own[0]), self.attention.part(of_attention, own[1])
            ssm, attention = side_by_side(*parts)
        else:
            ssm, attention = self.ssm.run(of_ssm, own[0]), self.attention.run(of_attention, own[1])
        return self.fuse(x, constrain(self._join(x, ssm, attention, plan), STREAM))

    def init_cache(self, batch: int, plan: BlockPlan, length: int) -> BlockCache:
        """Return the branches' caches before the first of `length` tokens."""
        attention_reads, ssm_reads = plan.reads
        return BlockCache(
            self.ssm.init_cache(batch, max(1, ssm_reads.count(length))),
            self.attention.init_cache(batch, max(1, attention_reads.count(length))),
        )

    def prefill(
        self, x: jax.Array, plan: BlockPlan, prompts: Prompts, length: int
    ) -> tuple[jax.Array, BlockCache]:
        """Return the stream [B, T, D] and the cache after each row, for `length` tokens."""
        attention_reads, ssm_reads = plan.reads
        ssm, ssm_cache = self.ssm.prefill_own(ssm_reads, plan.ssm, x, prompts, length)
        attention, attention_cache = self.attention.prefill_own(
            attention_reads, plan.attention, x, prompts, length
        )
        joined = self._join(x, ssm, attention, plan)
        return self.fuse(x, joined), BlockCache(ssm_cache, attention_cache)

    def step(
        self, x: jax.Array, plan: BlockPlan, positions: jax.Array, cache: BlockCache
    ) -> tuple[jax.Array, BlockCache]:
        """Return the stream [B, D] of tokens at `positions` [B], and the resulting cache.

        A branch to which no sequence sends its token is skipped.
        """
        if not plan.is_split:
            ssm, ssm_cache = self.ssm.step(x, cache.ssm)
            attention, attention_cache = self.attention.step(x, cache.attention)
            joined = self._join_shared(x, ssm, attention)
            return self.fuse(x, joined), BlockCache(ssm_cache, attention_cache)

        attends = contains(plan.attention, positions)
        ssm, ssm_cache = self.ssm.step_active(
            x, cache.ssm, ~attends, positions, reads_all=plan.reads_all
        )
        attention, attention_cache = self.attention.step_active(
            x, cache.attention, attends, positions, reads_all=plan.reads_all
        )
        joined = jnp.where(attends[:, None], attention, ssm)
        return self.fuse(x, joined), BlockCache(ssm_cache, attention_cache)

    def _join(
        self, x: jax.Array, ssm: jax.Array, attention: jax.Array, plan: BlockPlan
    ) -> jax.Array:
        """Return the branches' outputs for x [B, T, D] in order of position, as `fuse` takes them.

        That is [B, T, D] where tokens are split; else see `_join_shared`.
        """
        if plan.is_split:
            return merge(attention, ssm, plan)
        return self._join_shared(x, ssm, attention)

    def _join_shared(self, x: jax.Array, ssm: jax.Array, attention: jax.Array) -> jax.Array:
        """Return the outputs of both branches for the same tokens x [..., D], joined.

        For the paper's fusion they are concatenated, [..., 2D]. Otherwise the stream [..., D] is x
        plus what each branch adds to it.
        """
        if self.has_projections:
            return jnp.concatenate((ssm, attention), axis=-1)
        before, first, second = (y.astype(jnp.float32) for y in (x, ssm, attention))
        return (first + second - before).astype(x.dtype)


class StemBlock(nnx.Module):
    """A block of one branch, for all tokens. Its methods are those of `Block`."""

    def __init__(self, layer: Branch):
        self.layer = layer

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None = None, *, plan: BlockPlan
    ) -> jax.Array:
        """Return the stream [B, T, D] after the block."""
        del plan
        inputs = BranchInputs(x, segment_ids, {})
        return run_alone(self.layer.part(inputs)) if is_parallel() else self.layer.run(inputs)

    def init_cache(self, batch: int, plan: BlockPlan, length: int) -> Any:
        """Return the layer's cache before the first of `length` tokens."""
        del plan
        return self.layer.init_cache(batch, length)

    def prefill(
        self, x: jax.Array, plan: BlockPlan, prompts: Prompts, length: int
    ) -> tuple[jax.Array, Any]:
        """Return the stream [B, T, D] and the layer's cache after each row, for `length` tokens."""
        del plan
        return self.layer.prefill_own(*_ALL, x, prompts, length)

    def step(
        self, x: jax.Array, plan: BlockPlan, positions: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Return the stream [B, D] of tokens at `positions` [B], and the layer's new cache."""
        del plan
        return self.layer.step(x, cache, **self.layer.step_options(positions))
