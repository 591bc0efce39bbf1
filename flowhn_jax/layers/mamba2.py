"""The Mamba-2 mixer (arXiv 2405.21060, section 7)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.decay import decay_rates
from flowhn_jax.layers.linear import linear
from flowhn_jax.layers.prompts import Prompts, where_active
from flowhn_jax.layers.ssm_init import dt_bias_init, uniform
from flowhn_jax.split.cost import conv_flops, ssd_flops
from kernels.causal_conv import causal_conv
from kernels.partition import constrain
from kernels.ssd import ssd, ssd_step

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


class Mamba2Cache(NamedTuple):
    """What a mixer keeps of the tokens before: inputs of the convolution, and the state."""

    conv: jax.Array  # [B, taps - 1, E + 2 G S]
    state: jax.Array  # [B, H, P, S] float32


class Mamba2(nnx.Module):
    """State space with one decay a head: D -> E channels, in heads of P with P x S states -> D.

    The heads of each of G groups share B and C, and their channels are normed together. Decays, the
    state and the norm are float32 whatever `dtype` is. Without `norms` the gate alone, silu(z), is
    on what is projected to the result. `multipliers` are factors on what in_proj makes: z, x, B, C
    and dt (Falcon-H1, arXiv 2507.22448).
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
        norms: bool = True,
        multipliers: tuple[float, float, float, float, float] | None = None,
    ):
        if inner % (head_dim * groups):
            raise ValueError(
                f"Mamba2: {inner} channels are not heads of {head_dim} in {groups} equal groups"
            )
        self.inner, self.state, self.conv, self.dtype = inner, state, conv, dtype
        self.head_dim, self.groups = head_dim, groups
        self.norms, self.multipliers = norms, multipliers
        heads = inner // head_dim
        convolved = inner + 2 * groups * state
        self.splits = (inner, inner + convolved)  # of what in_proj makes: z; x, B and C; dt
        self.convolved_splits = (inner, inner + groups * state)
        kwargs = dict(init_std=init_std, dtype=dtype, rngs=rngs)
        self.in_proj = linear(width, inner + convolved + heads, **kwargs)
        self.out_proj = linear(inner, width, **kwargs)
        if norms:
            self.norm = GatedRMSNorm(inner, groups, epsilon=norm_eps)
        self.conv_weight = nnx.Param(uniform(rngs.params(), (conv, convolved), conv**-0.5))
        self.conv_bias = nnx.Param(jnp.zeros(convolved))
        self.dt_bias = nnx.Param(dt_bias_init(rngs.params(), heads))
        decay = jax.random.uniform(rngs.params(), (heads,), minval=_A_MIN, maxval=_A_MAX)
        self.a_log = nnx.Param(jnp.log(decay))
        self.d = nnx.Param(jnp.ones(heads))

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """x [B, T, D], segment_ids [B, T] -> [B, T, D]; state restarts at each segment's start."""
        z, xbc, dt = self._projected(x)
        xbc = self._convolved(xbc, segment_ids)
        bias = self.dt_bias[...]
        y = ssd(*self._ssd_inputs(xbc, dt), dt_bias=bias, segment_ids=segment_ids)
        return self.out_proj(self._gated(y, z))

    def prefill(self, x: jax.Array, prompts: Prompts, length: int) -> tuple[jax.Array, Mamba2Cache]:
        """x [B, T, D] -> ([B, T, D], the cache behind each row's tokens)."""
        del length
        z, xbc, dt = self._projected(x)
        conv = prompts.tail(xbc, self.conv - 1)
        xbc = self._convolved(xbc, prompts.segment_ids)
        inputs = dict(dt_bias=self.dt_bias[...], segment_ids=prompts.segment_ids)
        arguments = self._ssd_inputs(xbc, prompts.mask_padding(dt))
        y, state = ssd(*arguments, **inputs, return_final_state=True)
        return self.out_proj(self._gated(y, z)), Mamba2Cache(conv, prompts.reset_state(state))

    def init_cache(self, batch: int, length: int) -> Mamba2Cache:
        """The cache before the first token; its size does not depend on `length`."""
        del length
        channels = self.inner + 2 * self.groups * self.state
        conv = jnp.zeros((batch, self.conv - 1, channels), self.dtype)
        heads = self.inner // self.head_dim
        state = jnp.zeros((batch, heads, self.head_dim, self.state), jnp.float32)
        return Mamba2Cache(conv, state)

    def step(
        self, x: jax.Array, cache: Mamba2Cache, active: jax.Array | None = None
    ) -> tuple[jax.Array, Mamba2Cache]:
        """One token of each sequence: x [B, D] -> ([B, D], the cache behind it).

        A sequence that is not `active` [B] keeps its cache; its output means nothing.
        """
        z, xbc, dt = self._projected(x)
        xbc, conv = causal_conv(
            xbc[:, None],
            self.conv_weight[...],
            self.conv_bias[...],
            initial_state=cache.conv,
            return_final_state=True,
        )
        inputs = self._ssd_inputs(jax.nn.silu(xbc[:, 0]), dt)
        y, state = ssd_step(*inputs, cache.state, dt_bias=self.dt_bias[...])
        behind = where_active(active, Mamba2Cache(conv, state), cache)
        return self.out_proj(self._gated(y, z)), behind

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """FLOPs of a sequence but for its projections', by the convention of `split/cost.py`."""
        del causal
        channels = self.inner + 2 * self.groups * self.state
        scan = ssd_flops(self.inner, self.state)
        return tokens * (scan + conv_flops(channels, self.conv))

    def _projected(self, x: jax.Array) -> list[jax.Array]:
        """z [..., E], what is convolved (x, B and C), and dt [..., H], of x [..., D]."""
        projected = self.in_proj(x)
        if self.multipliers is not None:
            shared = self.groups * self.state
            sizes = self.inner, self.inner, shared, shared, self.inner // self.head_dim
            factors = zip(self.multipliers, sizes, strict=True)
            factors = [jnp.full(size, factor, self.dtype) for factor, size in factors]
            projected = projected * jnp.concatenate(factors)
        return jnp.split(projected, self.splits, axis=-1)

    def _convolved(self, xbc: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        xbc = causal_conv(xbc, self.conv_weight[...], self.conv_bias[...], segment_ids=segment_ids)
        # Its channels are not cut before they are in parts: they would not be whole heads.
        return constrain(jax.nn.silu(xbc), "B L C")

    def _ssd_inputs(self, xbc: jax.Array, dt: jax.Array) -> tuple[jax.Array, ...]:
        """x, dt, A, B, C and D of the scan over xbc [..., E + 2 G S]."""
        u, b, c = jnp.split(xbc, self.convolved_splits, axis=-1)
        u = u.reshape(*u.shape[:-1], -1, self.head_dim)
        b, c = (v.reshape(*v.shape[:-1], self.groups, -1) for v in (b, c))
        return u, dt, decay_rates(self.a_log[...]), b, c, self.d[...]

    def _gated(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """y [..., H, P], gated by z [..., E] -> [..., E]."""
        y = y.reshape(z.shape)
        return self.norm(y, z) if self.norms else y * jax.nn.silu(z)
