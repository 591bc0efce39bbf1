"""The Mamba-2 mixer (arXiv 2405.21060, section 7)."""

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.linear import linear
from flowhn_jax.layers.ssm_init import dt_bias_init, uniform
from kernels.causal_conv import causal_conv
from kernels.partition import constrain
from kernels.ssd import ssd

_A_MIN, _A_MAX = 1.0, 16.0  # of the initial decay rates, as in the authors' code


class GatedRMSNorm(nnx.Module):
    """RMS norm of x * silu(gate) over each of G groups of channels, in float32."""

    def __init__(self, features: int, groups: int, *, epsilon: float):
        self.groups = groups
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """x, gate [..., E] -> [..., E] in float32."""
        gated = x.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        by_group = gated.reshape(*gated.shape[:-1], self.groups, -1)
        mean_square = jnp.square(by_group).mean(-1, keepdims=True)
        normed = by_group * jax.lax.rsqrt(mean_square + self.epsilon)
        return normed.reshape(gated.shape) * self.scale[...]


class Mamba2(nnx.Module):
    """State space with one decay a head: D -> E channels, in heads of P with P x S states -> D.

    The heads of each of G groups share B and C, and their channels are normed together. Decays, the
    state and the norm are float32 whatever `dtype` is.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        state: int,
        conv: int,
        head_dim: int,
        groups: int,
        *,
        norm_eps: float,
        init_std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if inner % (head_dim * groups):
            raise ValueError(
                f"Mamba2: {inner} channels are not heads of {head_dim} in {groups} equal groups"
            )
        self.head_dim = head_dim
        self.groups = groups
        heads = inner // head_dim
        convolved = inner + 2 * groups * state
        self.splits = (inner, inner + convolved)  # of what in_proj makes: z; x, B and C; dt
        self.convolved_splits = (inner, inner + groups * state)
        kwargs = dict(init_std=init_std, dtype=dtype, rngs=rngs)
        self.in_proj = linear(width, inner + convolved + heads, **kwargs)
        self.out_proj = linear(inner, width, **kwargs)
        self.norm = GatedRMSNorm(inner, groups, epsilon=norm_eps)
        self.conv_weight = nnx.Param(uniform(rngs.params(), (conv, convolved), conv**-0.5))
        self.conv_bias = nnx.Param(jnp.zeros(convolved))
        self.dt_bias = nnx.Param(dt_bias_init(rngs.params(), heads))
        decay = jax.random.uniform(rngs.params(), (heads,), minval=_A_MIN, maxval=_A_MAX)
        self.a_log = nnx.Param(jnp.log(decay))
        self.d = nnx.Param(jnp.ones(heads))

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """x [B, T, D], segment_ids [B, T] -> [B, T, D]; state restarts at each segment's start."""
        batch, length, _ = x.shape
        z, xbc, dt = jnp.split(self.in_proj(x), self.splits, axis=-1)
        xbc = causal_conv(xbc, self.conv_weight[...], self.conv_bias[...], segment_ids=segment_ids)
        # Its channels are not cut before they are in parts: they would not be whole heads.
        xbc = constrain(jax.nn.silu(xbc), "B L C")
        u, b, c = jnp.split(xbc, self.convolved_splits, axis=-1)
        y = ssd(
            u.reshape(batch, length, -1, self.head_dim),
            dt,
            -jnp.exp(self.a_log[...]),
            b.reshape(batch, length, self.groups, -1),
            c.reshape(batch, length, self.groups, -1),
            self.d[...],
            dt_bias=self.dt_bias[...],
            segment_ids=segment_ids,
        )
        return self.out_proj(self.norm(y.reshape(z.shape), z))
