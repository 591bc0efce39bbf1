"""FlowHN (arXiv 2505.19472): parallel hybrid blocks whose branches share the tokens."""

from collections.abc import Iterator
from typing import Any

import jax

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.flowhn_blocks import Block, Branch, StemBlock, branch_mixer
from flowhn_jax.models.flowhn_config import FlowHNConfig
from flowhn_jax.models.flowhn_learned import LearnedBlock
from flowhn_jax.models.language_model import STREAM, FlopPart, LanguageModel
from flowhn_jax.models.registry import register
from flowhn_jax.split import LearnedBlockPlan, Plan
from kernels.partition import constrain


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

    def block_options(self, length: int) -> list[dict[str, Any]]:
        """Return the plan of each block for `length` tokens."""
        return [{"plan": plan} for plan in self.config.plan(length).blocks]

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
            x = constrain(x, STREAM)
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
