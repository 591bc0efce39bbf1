"""FlowHN (arXiv 2505.19472): parallel hybrid blocks whose branches share the tokens."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.config import ModelConfig
from flowhn_jax.layers.attention import KVCache
from flowhn_jax.layers.decoder import DecoderLayer, attention, compute_dtype, mamba1, mamba2
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.mamba1 import Mamba1Cache
from flowhn_jax.layers.mamba2 import Mamba2Cache
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.language_model import STREAM, LanguageModel, checkpointed
from flowhn_jax.parallel.branch import Part, is_parallel, side_by_side
from flowhn_jax.split import BlockPlan, Plan, Selection, contains, count, merge, take
from kernels.partition import constrain


class BlockCache(NamedTuple):
    """What each branch keeps of the tokens that were sent to it."""

    ssm: Mamba1Cache | Mamba2Cache
    attention: KVCache


class Block(nnx.Module):
    """An SSM branch and an attention branch side by side, and the fusion of their outputs."""

    def __init__(self, config: ModelConfig, is_split: bool, rngs: nnx.Rngs):
        dims, dtype = config.dims, compute_dtype(config)
        kwargs = dict(init_std=config.init_std, dtype=dtype, rngs=rngs)
        mixers = (mamba2 if config.is_mamba2 else mamba1)(config, rngs), attention(config, rngs)
        self.ssm, self.attention = (
            DecoderLayer(config, mixer, rngs, has_mlp=config.branch_mlp) for mixer in mixers
        )
        fused_width = dims.width if is_split else 2 * dims.width
        self.branch_proj = linear(fused_width, dims.width, **kwargs)
        self.norm = rms_norm(dims.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.final_proj = linear(dims.width, dims.width, **kwargs)

    def __call__(
        self, x: jax.Array, plan: BlockPlan, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """x [B, T, D], segment_ids [B, T] -> [B, T, D]."""
        fused = constrain(self._branches(x, plan, segment_ids), STREAM)
        return constrain(self._fused(x, fused), STREAM)

    def init_cache(self, batch: int, plan: BlockPlan, length: int) -> BlockCache:
        """The branches' caches before the first of `length` tokens."""
        caches = (
            branch.init_cache(batch, max(1, selection.count(length)))
            for branch, selection in self._sides(plan)
        )
        return BlockCache(*caches)

    def prefill(
        self, x: jax.Array, plan: BlockPlan, prompts: Prompts, length: int
    ) -> tuple[jax.Array, BlockCache]:
        """x [B, T, D] -> ([B, T, D], the cache behind each row, for `length` tokens in all)."""
        outputs, caches = [], self.init_cache(x.shape[0], plan, length)
        for index, (branch, selection) in enumerate(self._sides(plan)):
            of_branch, y = prompts, x
            if plan.is_split:
                y = take(x, selection)
                ids = prompts.segment_ids
                of_branch = Prompts(
                    count(selection, prompts.lengths),
                    count(selection, prompts.first),
                    None if ids is None else take(ids, selection),
                )
            if y.shape[1]:  # a short prompt may lie within the other branch
                room = max(1, selection.count(length))
                y, cache = branch.prefill(y, of_branch, room)
                caches = caches._replace(**{caches._fields[index]: cache})
            outputs.append(y)
        ssm, attention = outputs
        if plan.is_split:
            fused = merge(attention, ssm, plan)
        else:
            fused = jnp.concatenate((ssm, attention), axis=-1)
        return constrain(self._fused(x, fused), STREAM), caches

    def step(
        self, x: jax.Array, plan: BlockPlan, positions: jax.Array, cache: BlockCache
    ) -> tuple[jax.Array, BlockCache]:
        """One token of each sequence: x [B, D], `positions` [B] -> ([B, D], the cache behind it).

        A branch to which no sequence sends its token is skipped.
        """
        if not plan.is_split:
            ssm, of_ssm = self.ssm.step(x, cache.ssm)
            attention, of_attention = self.attention.step(x, cache.attention)
            fused = jnp.concatenate((ssm, attention), axis=-1)
            return self._fused(x, fused), BlockCache(of_ssm, of_attention)

        attends = contains(plan.attention, positions)
        ssm, of_ssm = _step_of(self.ssm, x, cache.ssm, ~attends)
        attention, of_attention = _step_of(self.attention, x, cache.attention, attends)
        fused = jnp.where(attends[:, None], attention, ssm)
        return self._fused(x, fused), BlockCache(of_ssm, of_attention)

    def _fused(self, x: jax.Array, fused: jax.Array) -> jax.Array:
        x = x + self.branch_proj(fused)
        return x + self.final_proj(self.norm(x))

    def _sides(self, plan: BlockPlan) -> tuple[tuple[DecoderLayer, Selection], ...]:
        """Both branches with their tokens, in the order of BlockCache."""
        return (self.ssm, plan.ssm), (self.attention, plan.attention)

    def _branches(self, x, plan, segment_ids):
        """Both branches' outputs: [B, T, D] where tokens are split, else [B, T, 2D], SSM first."""

        def part(branch: DecoderLayer, selection: Selection) -> Part:
            inputs = x, segment_ids
            if plan.is_split:
                inputs = jax.tree.map(lambda v: take(v, selection), inputs)
            graph, params = nnx.split(branch)
            return Part(partial(_run, graph), params, inputs)

        parts = part(self.ssm, plan.ssm), part(self.attention, plan.attention)
        if is_parallel():
            ssm, attention = side_by_side(*parts)
        else:
            ssm, attention = (part.run() for part in parts)
        if not plan.is_split:
            return jnp.concatenate((ssm, attention), axis=-1)
        return merge(attention, ssm, plan)


def _run(graph: nnx.GraphDef, params: nnx.State, inputs: tuple[jax.Array, jax.Array | None]):
    """A branch on its tokens; a short prefix may lie within the other branch."""
    x, segment_ids = inputs
    return nnx.merge(graph, params)(x, segment_ids) if x.shape[1] else x


def _step_of(
    branch: DecoderLayer, x: jax.Array, cache: Any, active: jax.Array
) -> tuple[jax.Array, Any]:
    """A branch's step for the sequences that are `active` [B], or nothing where none is."""
    return jax.lax.cond(active.any(), lambda: branch.step(x, cache, active), lambda: (x, cache))


class FlowHN(LanguageModel):
    """Parallel hybrid blocks, whose plan follows the config and the length."""

    def block(self, index: int, rngs: nnx.Rngs) -> Block:
        """Block `index`; its fusion is wider where both branches see all tokens."""
        return Block(self.config, self.config.plan().blocks[index].is_split, rngs)

    def apply_blocks(self, x: jax.Array, segment_ids: jax.Array | None, remat: str) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        plans = self.config.plan(x.shape[1]).blocks
        for block, plan in zip(self.blocks, plans, strict=True):
            run = checkpointed(lambda x, ids, block=block, plan=plan: block(x, plan, ids), remat)
            x = run(x, segment_ids)
        return x

    def init_blocks(self, batch: int, length: int) -> list[BlockCache]:
        """The blocks' caches before the first of `length` tokens, which the plan must reach."""
        plans = self._decode_plan(length).blocks
        return [
            block.init_cache(batch, plan, length)
            for block, plan in zip(self.blocks, plans, strict=True)
        ]

    def fill(
        self, x: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, list[BlockCache]]:
        """x [B, T, D] -> ([B, T, D], the blocks' caches behind each row's tokens)."""
        caches = []
        for block, plan in zip(self.blocks, self._decode_plan(length).blocks, strict=True):
            x, cache = block.prefill(x, plan, prompts, length)
            caches.append(cache)
        return x, caches

    def advance(
        self, x: jax.Array, caches: list[BlockCache], positions: jax.Array
    ) -> tuple[jax.Array, list[BlockCache]]:
        """x [B, D] at `positions` [B] through the blocks -> ([B, D], the caches behind it)."""
        behind = []
        for block, plan, cache in zip(
            self.blocks, self._decode_plan(None).blocks, caches, strict=True
        ):
            x, cache = block.step(x, plan, positions, cache)
            behind.append(cache)
        return x, behind

    def _decode_plan(self, length: int | None) -> Plan:
        if self.config.split.scope != "context":
            raise ValueError(
                f"split.scope is {self.config.split.scope!r}, which plans anew for each length and "
                "so cannot decode; accepted is 'context'."
            )
        return self.config.plan(length)

    def parts(self, length: int) -> Iterator[tuple[nnx.Module, int]]:
        """All that costs FLOPs, with the tokens that it gets of a sequence of `length`."""
        for block, plan in zip(self.blocks, self.config.plan(length).blocks, strict=True):
            yield block.ssm, plan.ssm.count(length)
            yield block.attention, plan.attention.count(length)
            yield block.branch_proj, length
            yield block.final_proj, length
        yield self.head, length
