"""The Mamba-1 mixer (arXiv 2312.00752, and Jamba's, 2403.19887, for norms on dt, B and C)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.prompts import Prompts, only_where
from flowhn_jax.layers.ssm_init import dt_bias_init, uniform
from flowhn_jax.split.cost import conv_flops, scan_flops
from kernels.causal_conv import causal_conv
from kernels.selective_scan import selective_scan, selective_scan_step


class Mamba1Cache(NamedTuple):
    """What a mixer keeps of the tokens before: inputs of the convolution, and the state."""

    conv: jax.Array  # [B, taps - 1, E]
    state: jax.Array  # [B, E, S] float32


class Mamba1(nnx.Module):
    """Selective state space: D -> E channels with S states each -> D.

    The step size dt, the matrices' norms and the recurrence are float32 whatever `dtype` is.
    Without `norms` dt, B and C are taken as they are, without `projects` the result is the
    channels', [..., E].
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
        norms: bool = True,
        projects: bool = True,
    ):
        self.inner, self.state, self.conv, self.dtype = inner, state, conv, dtype
        self.norms, self.projects = norms, projects
        self.splits = (dt_rank, dt_rank + state)
        kwargs = dict(init_std=init_std, dtype=dtype, rngs=rngs)
        self.in_proj = linear(width, (2, inner), **kwargs)
        self.x_proj = linear(inner, dt_rank + 2 * state, output_dtype=jnp.float32, **kwargs)
        self.dt_proj = linear(dt_rank, inner, output_dtype=jnp.float32, **kwargs)
        self.dt_proj.kernel[...] = uniform(rngs.params(), (dt_rank, inner), dt_rank**-0.5)
        if projects:
            self.out_proj = linear(inner, width, **kwargs)
        if norms:
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
        u = self._convolved(u, segment_ids)
        inputs = dict(z=z, dt_bias=self.dt_bias[...], segment_ids=segment_ids)
        return self._out(selective_scan(*self._scan_inputs(u), **inputs))

    def prefill(self, x: jax.Array, prompts: Prompts, length: int) -> tuple[jax.Array, Mamba1Cache]:
        """x [B, T, D] -> ([B, T, D], the cache behind each row's tokens)."""
        del length
        u, z = jnp.unstack(self.in_proj(x), axis=-2)
        conv = prompts.tail(u, self.conv - 1)
        u, dt, *others = self._scan_inputs(self._convolved(u, prompts.segment_ids))
        inputs = dict(z=z, dt_bias=self.dt_bias[...], segment_ids=prompts.segment_ids)
        dt = prompts.without_steps(dt)
        y, state = selective_scan(u, dt, *others, **inputs, return_final_state=True)
        return self._out(y), Mamba1Cache(conv, prompts.restarted(state))

    def init_cache(self, batch: int, length: int) -> Mamba1Cache:
        """The cache before the first token; its size does not depend on `length`."""
        del length
        conv = jnp.zeros((batch, self.conv - 1, self.inner), self.dtype)
        return Mamba1Cache(conv, jnp.zeros((batch, self.inner, self.state), jnp.float32))

    def step(
        self, x: jax.Array, cache: Mamba1Cache, active: jax.Array | None = None
    ) -> tuple[jax.Array, Mamba1Cache]:
        """One token of each sequence: x [B, D] -> ([B, D], the cache behind it).

        A sequence that is not `active` [B] keeps its cache; its output means nothing.
        """
        u, z = jnp.unstack(self.in_proj(x), axis=-2)
        u, conv = causal_conv(
            u[:, None],
            self.conv_weight[...],
            self.conv_bias[...],
            initial_state=cache.conv,
            return_final_state=True,
        )
        u = jax.nn.silu(u[:, 0])
        inputs = dict(z=z, dt_bias=self.dt_bias[...])
        y, state = selective_scan_step(*self._scan_inputs(u), cache.state, **inputs)
        return self._out(y), only_where(active, Mamba1Cache(conv, state), cache)

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """FLOPs of a sequence but for its projections', by the convention of `split/cost.py`."""
        del causal
        scan = scan_flops(self.inner, self.state)
        return tokens * (scan + conv_flops(self.inner, self.conv))

    def _convolved(self, u: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        u = causal_conv(u, self.conv_weight[...], self.conv_bias[...], segment_ids=segment_ids)
        return jax.nn.silu(u)

    def _out(self, y: jax.Array) -> jax.Array:
        return self.out_proj(y) if self.projects else y

    def _scan_inputs(self, u: jax.Array) -> tuple[jax.Array, ...]:
        """u, dt, A, B, C and D of the scan over u [..., E]."""
        dt, b, c = jnp.split(self.x_proj(u), self.splits, axis=-1)
        if self.norms:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        return u, self.dt_proj(dt), -jnp.exp(self.a_log[...]), b, c, self.d[...]
