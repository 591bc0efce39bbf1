"""Jamba's Mamba-1 mixer (arXiv 2312.00752, and 2403.19887 for the norms on dt, B and C)."""

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.ssm_init import dt_bias_init, uniform
from kernels.causal_conv import causal_conv
from kernels.selective_scan import selective_scan


class Mamba1(nnx.Module):
    """Selective state space: D -> E channels with S states each -> D.

    The step size dt, the matrices' norms and the recurrence are float32 whatever `dtype` is.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        state: int,
        conv: int,
        dt_rank: int,
        *,
        norm_eps: float,
        init_std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.splits = (dt_rank, dt_rank + state)
        kwargs = dict(init_std=init_std, dtype=dtype, rngs=rngs)
        self.in_proj = linear(width, (2, inner), **kwargs)
        self.x_proj = linear(inner, dt_rank + 2 * state, output_dtype=jnp.float32, **kwargs)
        self.dt_proj = linear(dt_rank, inner, output_dtype=jnp.float32, **kwargs)
        self.dt_proj.kernel[...] = uniform(rngs.params(), (dt_rank, inner), dt_rank**-0.5)
        self.out_proj = linear(inner, width, **kwargs)
        norm = dict(epsilon=norm_eps, dtype=jnp.float32, rngs=rngs)
        self.dt_norm = rms_norm(dt_rank, **norm)
        self.b_norm = rms_norm(state, **norm)
        self.c_norm = rms_norm(state, **norm)
        self.conv_weight = nnx.Param(uniform(rngs.params(), (conv, inner), conv**-0.5))
        self.conv_bias = nnx.Param(jnp.zeros(inner))
        self.dt_bias = nnx.Param(dt_bias_init(rngs.params(), inner))
        decay = jnp.arange(1, state + 1, dtype=jnp.float32)
        self.a_log = nnx.Param(jnp.broadcast_to(jnp.log(decay), (inner, state)))
        self.d = nnx.Param(jnp.ones(inner))

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """x [B, T, D], segment_ids [B, T] -> [B, T, D]; state restarts at each segment's start."""
        u, z = jnp.unstack(self.in_proj(x), axis=-2)
        u = causal_conv(u, self.conv_weight[...], self.conv_bias[...], segment_ids=segment_ids)
        u = jax.nn.silu(u)
        dt, b, c = jnp.split(self.x_proj(u), self.splits, axis=-1)
        y = selective_scan(
            u,
            self.dt_proj(self.dt_norm(dt)),
            -jnp.exp(self.a_log[...]),
            self.b_norm(b),
            self.c_norm(c),
            self.d[...],
            z=z,
            dt_bias=self.dt_bias[...],
            segment_ids=segment_ids,
        )
        return self.out_proj(y)
