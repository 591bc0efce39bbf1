"""FlowHN (arXiv 2505.19472): parallel hybrid blocks whose branches share the tokens."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.config import ModelConfig
from flowhn_jax.layers.decoder import DecoderLayer, attention, compute_dtype, mamba1, mamba2
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.models.language_model import STREAM, LanguageModel, checkpointed
from flowhn_jax.parallel.branch import Part, is_parallel, side_by_side
from flowhn_jax.split import BlockPlan, Selection, merge, take
from kernels.partition import constrain


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
        x = x + self.branch_proj(fused)
        return constrain(x + self.final_proj(self.norm(x)), STREAM)

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


class FlowHN(LanguageModel):
    """Parallel hybrid blocks, whose plan follows the config and the length."""

    def block(self, index: int, rngs: nnx.Rngs) -> Block:
        """Block `index`; its fusion is wider where both branches see all tokens."""
        return Block(self.config, self.config.plan().blocks[index].is_split, rngs)

    def through_blocks(self, x: jax.Array, segment_ids: jax.Array | None, remat: str) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        plans = self.config.plan(x.shape[1]).blocks
        for block, plan in zip(self.blocks, plans, strict=True):
            run = checkpointed(lambda x, ids, block=block, plan=plan: block(x, plan, ids), remat)
            x = run(x, segment_ids)
        return x

    def parts(self, length: int) -> Iterator[tuple[nnx.Module, int]]:
        """All that costs FLOPs, with the tokens that it gets of a sequence of `length`."""
        for block, plan in zip(self.blocks, self.config.plan(length).blocks, strict=True):
            yield block.ssm, plan.ssm.count(length)
            yield block.attention, plan.attention.count(length)
            yield block.branch_proj, length
            yield block.final_proj, length
        yield self.head, length
