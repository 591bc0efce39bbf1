"""FlowHN's block: an SSM branch and an attention branch that share the tokens by a plan."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.attention import Attention, KVCache
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.mamba1 import Mamba1, Mamba1Cache
from flowhn_jax.layers.mamba2 import Mamba2, Mamba2Cache
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.flowhn_branches import (
    branch_part,
    prefill_branch,
    run_branch,
    step_branch,
    take_tokens,
)
from flowhn_jax.models.flowhn_config import FlowHNConfig
from flowhn_jax.models.language_model import STREAM
from flowhn_jax.parallel.branch import is_parallel, side_by_side
from flowhn_jax.split import BlockPlan, contains, merge
from kernels.partition import constrain


def branch_mixer(
    config: FlowHNConfig, branch: str, context: LayerContext
) -> Mamba1 | Mamba2 | Attention:
    """Return the mixer of the branch 'ssm' or 'attention'."""
    if branch == "attention":
        rope_theta = config.attention_rope_theta or None
        return Attention(config.attention_sizes, context, rope_theta=rope_theta)
    if config.is_mamba2:
        return Mamba2(config.mamba2_sizes, context)
    return Mamba1(config.mamba1_sizes, context)


def branch_layer(
    config: FlowHNConfig,
    branch: str,
    mixer: Mamba1 | Mamba2 | Attention,
    context: LayerContext,
) -> DecoderLayer[Any]:
    """Return the decoder layer of the branch 'ssm' or 'attention' around its mixer."""
    return DecoderLayer(mixer, config.width, config.branch_mlp_width(branch), context)


class BlockCache(NamedTuple):
    """The caches of both branches, each of the tokens that it has read."""

    ssm: Mamba1Cache | Mamba2Cache
    attention: KVCache


class ParallelBranches(nnx.Module):
    """An SSM branch and an attention branch in parallel, and the fusion of their outputs."""

    def __init__(self, config: FlowHNConfig, is_split: bool, context: LayerContext):
        width = config.width
        # Both mixers draw their parameters before the rest of the branches does.
        mixers = {name: branch_mixer(config, name, context) for name in ("ssm", "attention")}
        self.ssm = branch_layer(config, "ssm", mixers["ssm"], context)
        self.attention = branch_layer(config, "attention", mixers["attention"], context)
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
        attention_reads, ssm_reads = plan.reads
        works = [
            (branch, read, own, take_tokens(x, segment_ids, read))
            for branch, read, own in (
                (self.ssm, ssm_reads, plan.ssm),
                (self.attention, attention_reads, plan.attention),
            )
        ]
        if is_parallel():
            parts = (branch_part(*work, length=x.shape[1]) for work in works)
            ssm, attention = side_by_side(*parts)
        else:
            ssm, attention = (run_branch(*work, length=x.shape[1]) for work in works)
        joined = constrain(self._join(x, ssm, attention, plan), STREAM)
        return constrain(self.fuse(x, joined), STREAM)

    def init_cache(self, batch: int, plan: BlockPlan, length: int) -> BlockCache:
        """Return the branches' caches before the first of `length` tokens."""
        attention, ssm = plan.reads
        return BlockCache(
            self.ssm.init_cache(batch, max(1, ssm.count(length))),
            self.attention.init_cache(batch, max(1, attention.count(length))),
        )

    def prefill(
        self, x: jax.Array, plan: BlockPlan, prompts: Prompts, length: int
    ) -> tuple[jax.Array, BlockCache]:
        """Return the stream [B, T, D] and the cache after each row, for `length` tokens."""
        attention_reads, ssm_reads = plan.reads
        ssm, of_ssm = prefill_branch(self.ssm, ssm_reads, plan.ssm, x, prompts, length)
        attention, of_attention = prefill_branch(
            self.attention, attention_reads, plan.attention, x, prompts, length
        )
        joined = self._join(x, ssm, attention, plan)
        return constrain(self.fuse(x, joined), STREAM), BlockCache(of_ssm, of_attention)

    def step(
        self, x: jax.Array, plan: BlockPlan, positions: jax.Array, cache: BlockCache
    ) -> tuple[jax.Array, BlockCache]:
        """Return the stream [B, D] of tokens at `positions` [B], and the resulting cache.

        A branch to which no sequence sends its token is skipped.
        """
        if not plan.is_split:
            ssm, of_ssm = self.ssm.step(x, cache.ssm)
            attention, of_attention = self.attention.step(x, cache.attention)
            joined = self._join_shared(x, ssm, attention)
            return self.fuse(x, joined), BlockCache(of_ssm, of_attention)

        attends = contains(plan.attention, positions)
        ssm, of_ssm = step_branch(
            self.ssm, x, cache.ssm, ~attends, positions, reads_all=plan.reads_all
        )
        attention, of_attention = step_branch(
            self.attention, x, cache.attention, attends, positions, reads_all=plan.reads_all
        )
        joined = jnp.where(attends[:, None], attention, ssm)
        return self.fuse(x, joined), BlockCache(of_ssm, of_attention)

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
