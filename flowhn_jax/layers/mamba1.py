"""The Mamba-1 mixer (arXiv 2312.00752, and Jamba's, 2403.19887, for norms on dt, B and C)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.decay import decay_rates
from flowhn_jax.layers.documents import (
    DocumentIndex,
    convolved_prefix,
    elapsed_in_documents,
    index_documents,
    scanned_prefix,
)
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.prompts import Prompts, where_active
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
    channels', [..., E]. The first `prefix` tokens, which are the same in all rows, are before every
    document of a packed row: each begins from the state and the inputs that they leave.
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
        prefix: int = 0,
    ):
        self.inner, self.state, self.conv, self.dtype = inner, state, conv, dtype
        self.norms, self.projects, self.prefix = norms, projects, prefix
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
        return self._out(self._scanned(self._scan_inputs(u), z, segment_ids)[0])

    def prefill(self, x: jax.Array, prompts: Prompts, length: int) -> tuple[jax.Array, Mamba1Cache]:
        """x [B, T, D] -> ([B, T, D], the cache behind each row's tokens)."""
        del length
        u, z = jnp.unstack(self.in_proj(x), axis=-2)
        conv = prompts.tail(u, self.conv - 1, self.prefix)
        u, dt, *others = self._scan_inputs(self._convolved(u, prompts.segment_ids))
        dt = prompts.mask_padding(dt)
        y, state = self._scanned((u, dt, *others), z, prompts.segment_ids)
        return self._out(y), Mamba1Cache(conv, prompts.reset_state(state))

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
        return self._out(y), where_active(active, Mamba1Cache(conv, state), cache)

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """FLOPs of a sequence but for its projections', by the convention of `split/cost.py`."""
        del causal
        scan = scan_flops(self.inner, self.state)
        return tokens * (scan + conv_flops(self.inner, self.conv))

    def _convolved(self, u: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        y = causal_conv(u, self.conv_weight[...], self.conv_bias[...], segment_ids=segment_ids)
        if self.prefix and self.conv > 1 and segment_ids is not None:
            # A convolution of the prefix's last inputs alone, at the places that see them.
            before = u[:1, max(0, self.prefix - self.conv + 1) : self.prefix].astype(jnp.float32)
            before = jnp.pad(before, ((0, 0), (self.conv - 1 - before.shape[1], 0), (0, 0)))
            options = dict(initial_state=before)
            table = causal_conv(jnp.zeros_like(before), self.conv_weight[...], **options)[0]
            y = _added(y, convolved_prefix(table, index_documents(segment_ids)))
        return jax.nn.silu(y)

    def _scanned(
        self, arguments: tuple[jax.Array, ...], z: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the scan's gated outputs [B, T, E] and the state after the last token."""
        inputs = dict(z=z, dt_bias=self.dt_bias[...], segment_ids=segment_ids)
        y, state = selective_scan(*arguments, **inputs, return_final_state=True)
        if not self.prefix or segment_ids is None:
            return y, state
        index = index_documents(segment_ids)
        added, added_state = self._scan_of_prefix(arguments, index)
        y = _added(y, added * jax.nn.silu(z.astype(jnp.float32)))
        return y, state + jnp.where(index.is_later[:, -1, None, None], added_state, 0)

    def _scan_of_prefix(
        self, arguments: tuple[jax.Array, ...], index: DocumentIndex
    ) -> tuple[jax.Array, jax.Array]:
        """Return what the state after the prefix adds to later outputs and to the last state."""
        u, dt, A, b, c, d = arguments
        u_prefix, dt_prefix, b_prefix, c_prefix = (v[:1, : self.prefix] for v in (u, dt, b, c))
        options = dict(dt_bias=self.dt_bias[...], return_final_state=True)
        state = selective_scan(u_prefix, dt_prefix, A, b_prefix, c_prefix, d, **options)[1][0]
        delta = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...])
        elapsed = elapsed_in_documents(delta, index)
        kept = jnp.exp(elapsed[:, -1, :, None] * A) * state
        return scanned_prefix(elapsed, A, c, state, index), kept

    def _out(self, y: jax.Array) -> jax.Array:
        return self.out_proj(y) if self.projects else y

    def _scan_inputs(self, u: jax.Array) -> tuple[jax.Array, ...]:
        """u, dt, A, B, C and D of the scan over u [..., E]."""
        dt, b, c = jnp.split(self.x_proj(u), self.splits, axis=-1)
        if self.norms:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        return u, self.dt_proj(dt), decay_rates(self.a_log[...]), b, c, self.d[...]


def _added(y: jax.Array, more: jax.Array) -> jax.Array:
    """Return the sum in float32, in the dtype of y."""
    return (y.astype(jnp.float32) + more).astype(y.dtype)
