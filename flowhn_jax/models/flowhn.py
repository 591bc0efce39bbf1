"""FlowHN (arXiv 2505.19472): parallel hybrid blocks whose branches share the tokens."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.config import ModelConfig
from flowhn_jax.layers.attention import Attention
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.mamba1 import Mamba1
from flowhn_jax.layers.mamba2 import Mamba2
from flowhn_jax.layers.mlp import SwiGLU
from flowhn_jax.parallel.branch import Part, is_parallel, side_by_side
from flowhn_jax.split import BlockPlan, Selection, merge, take
from kernels.backends import target_platform
from kernels.partition import constrain

_STREAM, _BRANCH = "B stream D", "B L D"
# From the embedding's layout to the stream's: XLA finds no way of its own, and gathers x whole.
_FROM_EMBEDDING = "row column shard", "row stream part", _STREAM

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Dtype of matrix products: `model.dtype`, where 'auto' is float32 on a CPU else bfloat16."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if target_platform() == "cpu" else jnp.bfloat16)


class Branch(nnx.Module):
    """A whole decoder layer: x + mixer(RMS(x)), then x + SwiGLU(RMS(x)) where there is an MLP."""

    def __init__(self, config: ModelConfig, mixer: nnx.Module, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        norm = dict(epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.norm = rms_norm(config.width, **norm)
        self.mixer = mixer
        self.has_mlp = config.branch_mlp
        if self.has_mlp:
            self.mlp_norm = rms_norm(config.width, **norm)
            self.mlp = SwiGLU(
                config.width, config.mlp_width, init_std=config.init_std, dtype=dtype, rngs=rngs
            )

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        x = constrain(x, _BRANCH)
        x = x + self.mixer(self.norm(x), segment_ids)
        x = x + self.mlp(self.mlp_norm(x)) if self.has_mlp else x
        return constrain(x, _BRANCH)


def ssm_mixer(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The mixer of the SSM branch that `model.ssm` names."""
    dims = config.dims
    kwargs = dict(
        norm_eps=config.norm_eps,
        init_std=config.init_std,
        dtype=compute_dtype(config),
        rngs=rngs,
    )
    sizes = dims.width, dims.inner, dims.state, dims.conv
    if config.ssm == "mamba2":
        return Mamba2(*sizes, config.ssm_head_dim, config.ssm_groups, **kwargs)
    return Mamba1(*sizes, dims.dt_rank, **kwargs)


class Block(nnx.Module):
    """An SSM branch and an attention branch side by side, and the fusion of their outputs."""

    def __init__(self, config: ModelConfig, is_split: bool, rngs: nnx.Rngs):
        dims, dtype = config.dims, compute_dtype(config)
        kwargs = dict(init_std=config.init_std, dtype=dtype, rngs=rngs)
        mixer = ssm_mixer(config, rngs)
        attention = Attention(dims.width, dims.heads, dims.kv_heads, dims.head_dim, **kwargs)
        self.ssm = Branch(config, mixer, rngs)
        self.attention = Branch(config, attention, rngs)
        fused_width = dims.width if is_split else 2 * dims.width
        self.branch_proj = linear(fused_width, dims.width, **kwargs)
        self.norm = rms_norm(dims.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.final_proj = linear(dims.width, dims.width, **kwargs)

    def __call__(
        self, x: jax.Array, plan: BlockPlan, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """x [B, T, D], segment_ids [B, T] -> [B, T, D]."""
        fused = constrain(self._branches(x, plan, segment_ids), _STREAM)
        x = x + self.branch_proj(fused)
        return constrain(x + self.final_proj(self.norm(x)), _STREAM)

    def _branches(self, x, plan, segment_ids):
        """Both branches' outputs: [B, T, D] where tokens are split, else [B, T, 2D], SSM first."""

        def part(branch: Branch, selection: Selection) -> Part:
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


class FlowHN(nnx.Module):
    """Embedding, parallel hybrid blocks, final norm and an untied head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.width,
            dtype=dtype,
            param_dtype=jnp.float32,
            embedding_init=jax.nn.initializers.normal(config.init_std),
            rngs=rngs,
        )
        self.blocks = nnx.List(
            [Block(config, block.is_split, rngs) for block in config.plan().blocks]
        )
        self.final_norm = rms_norm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head = linear(
            config.width, config.vocab_size, init_std=config.init_std, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, remat: str = "none"
    ) -> jax.Array:
        """Final hidden states, ready for the head.

        Args:
          tokens: [B, T] int32.
          segment_ids: [B, T] int32, documents of a packed sequence; None: one document.
          remat: what the backward pass keeps: 'none' recomputes nothing, 'dots' keeps the results
            of matrix products, 'full' only the blocks' inputs.

        Returns:
          [B, T, D] in the compute dtype.
        """
        x = self.embed(constrain(tokens, "row column"))
        for layout in _FROM_EMBEDDING:
            x = constrain(x, layout)
        plans = self.config.plan(tokens.shape[1]).blocks
        for block, plan in zip(self.blocks, plans, strict=True):
            if remat == "none":
                x = block(x, plan, segment_ids)
            else:
                apply = jax.checkpoint(
                    lambda x, block=block, plan=plan: block(x, plan, segment_ids),
                    policy=_REMAT_POLICIES[remat],
                )
                x = apply(x)
        return self.final_norm(x)
