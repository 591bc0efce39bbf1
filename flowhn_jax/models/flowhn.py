"""FlowHN (arXiv 2505.19472): parallel hybrid blocks whose branches share the tokens."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.flowhn_branches import (
    BlockCache,
    Branch,
    ParallelBranches,
    StemBlock,
    branch_mixer,
    take_tokens,
)
from flowhn_jax.models.flowhn_config import FlowHNConfig
from flowhn_jax.models.flowhn_learned import LearnedBlock
from flowhn_jax.models.language_model import STREAM, Blocks, FlopPart, LanguageModel
from flowhn_jax.models.registry import register
from flowhn_jax.parallel.branch import is_parallel, side_by_side
from flowhn_jax.split import BlockPlan, LearnedBlockPlan, Plan, contains, merge
from kernels.partition import constrain


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
        length = x.shape[1]
        tokens = take_tokens(x, segment_ids, ssm_reads)
        ssm_work = ssm_reads, plan.ssm, tokens
        tokens = take_tokens(x, segment_ids, attention_reads)
        attention_work = attention_reads, plan.attention, tokens
        if is_parallel():
            ssm, attention = side_by_side(
                self.ssm.part(*ssm_work, length=length),
                self.attention.part(*attention_work, length=length),
            )
        else:
            ssm = self.ssm.run(*ssm_work, length=length)
            attention = self.attention.run(*attention_work, length=length)
        joined = constrain(self._join(x, ssm, attention, plan), STREAM)
        return constrain(self.fuse(x, joined), STREAM)

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
        return constrain(self.fuse(x, joined), STREAM), BlockCache(ssm_cache, attention_cache)

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


@register(FlowHNConfig)
class FlowHN(LanguageModel):
    """Parallel hybrid blocks, whose plan follows from the config and the length."""

    config: FlowHNConfig

    def make_block(self, index: int, context: LayerContext) -> Block | LearnedBlock | StemBlock:
        """Return block `index`; its fusion is wider where both branches see all tokens."""
        config = self.config
        kind = config.split.stem_kind
        if index < config.split.stem and kind != "no_split":
            mixer = branch_mixer(config, kind, context)
            return StemBlock(Branch(config, kind, mixer, context))
        plan = config.plan().blocks[index]
        if isinstance(plan, LearnedBlockPlan):
            return LearnedBlock(config, plan, context)
        return Block(config, plan.is_split, context)

    def apply_blocks(
        self, blocks: Blocks, x: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        """Return the stream [B, T, D] after all blocks, by the plan for T tokens."""
        for block, plan in zip(blocks, self.config.plan(x.shape[1]).blocks, strict=True):
            x = block(x, segment_ids, plan=plan)
        return x

    def init_block_caches(self, batch: int, length: int) -> list[Any]:
        """Return the blocks' caches before the first of `length` tokens."""
        plans = self._decode_plan(length).blocks
        return [
            block.init_cache(batch, plan, length)
            for block, plan in zip(self.blocks, plans, strict=True)
        ]

    def prefill_blocks(
        self, x: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, list[Any]]:
        """Return the stream [B, T, D] and the blocks' caches after each row's tokens."""
        caches = []
        for block, plan in zip(self.blocks, self._decode_plan(length).blocks, strict=True):
            x, cache = block.prefill(x, plan, prompts, length)
            caches.append(cache)
        return x, caches

    def decode_blocks(
        self, x: jax.Array, caches: list[Any], positions: jax.Array
    ) -> tuple[jax.Array, list[Any]]:
        """Return the stream [B, D] of tokens at `positions` [B], and the resulting caches."""
        new_caches = []
        for block, plan, cache in zip(
            self.blocks, self._decode_plan(None).blocks, caches, strict=True
        ):
            x, new_cache = block.step(x, plan, positions, cache)
            new_caches.append(new_cache)
        return x, new_caches

    def _decode_plan(self, length: int | None) -> Plan:
        if not self.config.can_decode:
            raise ValueError(
                "model.split.scope must be 'context' for decoding; got "
                f"{self.config.split.scope!r}, which makes a different plan for each length."
            )
        return self.config.plan(length)

    def flop_parts(self, length: int) -> Iterator[FlopPart]:
        """Yield each module that costs FLOPs, and how many tokens of `length` it processes."""
        for block, plan in zip(self.blocks, self.config.plan(length).blocks, strict=True):
            if isinstance(block, StemBlock):
                yield FlopPart(block.layer, length)
                continue
            if isinstance(block, LearnedBlock):
                yield FlopPart(block.router, length)
            attention_reads, ssm_reads = (each.count(length) for each in plan.reads)
            yield FlopPart(block.ssm, plan.ssm.count(length), ssm_reads)
            yield FlopPart(block.attention, plan.attention.count(length), attention_reads)
            if block.has_projections:
                yield FlopPart(block.branch_proj, length)
                yield FlopPart(block.final_proj, length)
        yield FlopPart(self.output_layer, length)
