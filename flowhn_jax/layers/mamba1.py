"""The Mamba-1 mixer (arXiv 2312.00752, and Jamba's, 2403.19887, for norms on dt, B and C)."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.convolution import convolve, convolve_step, value_of
from flowhn_jax.layers.decay import decay_rates
from flowhn_jax.layers.documents import (
    DocumentIndex,
    convolved_prefix,
    elapsed_in_documents,
    index_documents,
    scanned_prefix,
)
from flowhn_jax.layers.linear import linear, linear_part, linear_parts, rms_norm
from flowhn_jax.layers.ssm_biases import USUAL, SSMBiases
from flowhn_jax.layers.ssm_init import dt_bias_init, uniform
from flowhn_jax.layers.state_space import SequenceInputs, StateSpaceMixer
from flowhn_jax.split import take
from flowhn_jax.split.cost import conv_flops, scan_flops
from flowhn_jax.split.selection import EVERYTHING
from kernels.causal_conv import causal_conv
from kernels.selective_scan import selective_scan, selective_scan_step


class Mamba1Sizes(NamedTuple):
    """Sizes of a Mamba-1 mixer: D, E, S, W and R."""

    width: int
    inner: int
    state: int
    conv: int
    dt_rank: int


class Mamba1Cache(NamedTuple):
    """What the next token needs of the tokens so far.

    Attributes:
      conv: [B, W - 1, E], the convolution's last inputs.
      state: [B, E, S] float32, of the scan.
    """

    conv: jax.Array
    state: jax.Array


class ScanArguments(NamedTuple):
    """Arguments of the selective scan: u, z and dt [..., E], B and C [..., S].

    Named as in `kernels.selective_scan`. A [E, S], D [E] and dt_bias [E] are parameters.
    """

    u: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array
    z: jax.Array | None
    dt_bias: jax.Array


class Mamba1(StateSpaceMixer[Mamba1Cache]):
    """Selective state space with E channels of S states each (a `Mixer`).

    The step size dt, the norms of dt, B and C, and the recurrence are float32 whatever
    `context.dtype` is.

    Options:
      norms: RMS norms on dt, B and C, as in Jamba.
      unscaled_norm_epsilon: that of RMS norms without scales on dt, B and C, as in Falcon Mamba,
        which has no other `norms`; None: no such norms.
      biases: which parts have a bias.
      projects: False: no output projection, the result is that of the channels, [..., E].
      prefix: number of leading tokens, the same in all rows, that every document of a packed row
        follows: each starts from the state and the inputs after them.
    """

    def __init__(
        self,
        sizes: Mamba1Sizes,
        context: LayerContext,
        *,
        norms: bool = True,
        unscaled_norm_epsilon: float | None = None,
        biases: SSMBiases = USUAL,
        projects: bool = True,
        prefix: int = 0,
    ):
        width, inner, state, conv, dt_rank = sizes
        rngs = context.rngs
        self.inner, self.state, self.conv, self.dtype = inner, state, conv, context.dtype
        self.norms = norms or unscaled_norm_epsilon is not None
        self.projects, self.prefix = projects, prefix
        self.splits = (dt_rank, dt_rank + state)
        self.in_proj = linear(width, (2, inner), context, bias=biases.in_proj)
        self.x_proj = linear(inner, dt_rank + 2 * state, context, output_dtype=jnp.float32)
        self.dt_proj = linear(dt_rank, inner, context, output_dtype=jnp.float32)
        self.dt_proj.kernel[...] = uniform(rngs.params(), (dt_rank, inner), dt_rank**-0.5)
        if projects:
            self.out_proj = linear(inner, width, context, bias=biases.out_proj)
        if self.norms:
            kind = {"dtype": jnp.float32, "unscaled_epsilon": unscaled_norm_epsilon}
            self.dt_norm = rms_norm(dt_rank, context, **kind)
            self.b_norm = rms_norm(state, context, **kind)
            self.c_norm = rms_norm(state, context, **kind)
        self.conv_weight = nnx.Param(uniform(rngs.params(), (conv, inner), conv**-0.5))
        self.conv_bias = nnx.Param(jnp.zeros(inner)) if biases.conv else None
        self.dt_bias = nnx.Param(dt_bias_init(rngs.params(), inner))
        decay = jnp.arange(1, state + 1, dtype=jnp.float32)
        self.a_log = nnx.Param(jnp.broadcast_to(jnp.log(decay), (inner, state)))
        self.d = nnx.Param(jnp.ones(inner))

    def _mix(self, inputs: SequenceInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `StateSpaceMixer`."""
        x, segment_ids, prompts, selection = inputs
        if selection == EVERYTHING:
            u, z = linear_parts(self.in_proj, x)
        else:
            u, z = linear_part(self.in_proj, x, 0), None
        scanned = self._scan_arguments(self._convolve(u, segment_ids), z)
        if prompts is not None:
            scanned = scanned._replace(dt=prompts.mask_padding(scanned.dt))
        y, state = self._scan(scanned, segment_ids)
        if z is None:
            y = _gate(take(y, selection), linear_part(self.in_proj, take(x, selection), 1))
        return self._project_out(y), u, state

    def _cache(self, conv: jax.Array, state: jax.Array) -> Mamba1Cache:
        return Mamba1Cache(conv, state)

    def init_cache(self, batch: int, length: int) -> Mamba1Cache:
        """Return the cache before the first token; its size does not depend on `length`."""
        del length
        conv = jnp.zeros((batch, self.conv - 1, self.inner), self.dtype)
        return Mamba1Cache(conv, jnp.zeros((batch, self.inner, self.state), jnp.float32))

    def _advance(self, x: jax.Array, cache: Mamba1Cache) -> tuple[jax.Array, Mamba1Cache]:
        """See `StateSpaceMixer`."""
        u, z = jnp.unstack(self.in_proj(x), axis=-2)
        y, new_cache = self._step(u, z, cache)
        return self._project_out(y), new_cache

    def read(self, x: jax.Array, cache: Mamba1Cache) -> tuple[Callable[[], jax.Array], Mamba1Cache]:
        """Return a function that gates and projects the tokens x [B, D], and the new cache."""
        y, new_cache = self._step(linear_part(self.in_proj, x, 0), None, cache)
        return lambda: self._project_out(_gate(y, linear_part(self.in_proj, x, 1))), new_cache

    def selected_share(self, name: str) -> float:
        """Return 1 for the output projection, a half for the inputs' and gates', else 0."""
        return {"out_proj": 1.0, "in_proj": 0.5}.get(name, 0.0)

    def _step(
        self, u: jax.Array, z: jax.Array | None, cache: Mamba1Cache
    ) -> tuple[jax.Array, Mamba1Cache]:
        """Return the scan's outputs [B, E], gated by z [B, E] if it is given, and the new cache."""
        u, conv = convolve_step(u, self.conv_weight[...], value_of(self.conv_bias), cache.conv)
        y, state = selective_scan_step(**self._scan_arguments(u, z)._asdict(), state=cache.state)
        return y, Mamba1Cache(conv, state)

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """Return the FLOPs of the scan and of the convolution."""
        del causal
        scan = scan_flops(self.inner, self.state)
        return tokens * (scan + conv_flops(self.inner, self.conv))

    def _convolve(self, u: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        y = convolve(u, self.conv_weight[...], value_of(self.conv_bias), segment_ids)
        if self.prefix and self.conv > 1 and segment_ids is not None:
            # A convolution of the prefix's last inputs alone, at the positions that see them.
            before = u[:1, max(0, self.prefix - self.conv + 1) : self.prefix].astype(jnp.float32)
            before = jnp.pad(before, ((0, 0), (self.conv - 1 - before.shape[1], 0), (0, 0)))
            nothing = jnp.zeros_like(before)
            table = causal_conv(nothing, self.conv_weight[...], initial_state=before)[0]
            y = _add_in_float32(y, convolved_prefix(table, index_documents(segment_ids)))
        return jax.nn.silu(y)

    def _scan_arguments(self, u: jax.Array, z: jax.Array | None) -> ScanArguments:
        """Return the scan's arguments for convolved channels u [..., E] and gates z [..., E]."""
        dt, b, c = jnp.split(self.x_proj(u), self.splits, axis=-1)
        if self.norms:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        dt, rates = self.dt_proj(dt), decay_rates(self.a_log[...])
        return ScanArguments(u, dt, rates, b, c, self.d[...], z, self.dt_bias[...])

    def _scan(
        self, inputs: ScanArguments, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the scan's gated outputs [B, T, E] and the state after the last token."""
        y, state = cast(
            "tuple[jax.Array, jax.Array]",
            selective_scan(**inputs._asdict(), segment_ids=segment_ids, return_final_state=True),
        )
        if not self.prefix or segment_ids is None:
            return y, state
        index = index_documents(segment_ids)
        added, added_state = self._scan_of_prefix(inputs, index)
        assert inputs.z is not None, "layers with a prefix have outputs for all tokens"
        y = _add_in_float32(y, added * jax.nn.silu(inputs.z.astype(jnp.float32)))
        return y, state + jnp.where(index.is_later[:, -1, None, None], added_state, 0)

    def _scan_of_prefix(
        self, inputs: ScanArguments, index: DocumentIndex
    ) -> tuple[jax.Array, jax.Array]:
        """Return what the state after the prefix adds to later outputs and to the last state."""
        u, dt, A, b, c, d, _, bias = inputs
        u, first_dt, first_b, first_c = (v[:1, : self.prefix] for v in (u, dt, b, c))
        _, (state,) = selective_scan(
            u, first_dt, A, first_b, first_c, d, dt_bias=bias, return_final_state=True
        )
        elapsed = elapsed_in_documents(jax.nn.softplus(dt.astype(jnp.float32) + bias), index)
        last = jnp.exp(elapsed[:, -1, :, None] * A) * state
        return scanned_prefix(elapsed, A, c, state, index), last

    def _project_out(self, y: jax.Array) -> jax.Array:
        return self.out_proj(y) if self.projects else y


def _gate(y: jax.Array, z: jax.Array) -> jax.Array:
    """Return y * silu(z), computed in float32, in the dtype of y."""
    return (y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))).astype(y.dtype)


def _add_in_float32(y: jax.Array, more: jax.Array) -> jax.Array:
    """Return y + more, summed in float32, in the dtype of y."""
    return (y.astype(jnp.float32) + more).astype(y.dtype)
