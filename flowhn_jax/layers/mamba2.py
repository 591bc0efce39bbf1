"""The Mamba-2 mixer (arXiv 2405.21060, section 7)."""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.convolution import convolve, convolve_step, value_of
from flowhn_jax.layers.decay import decay_rates
from flowhn_jax.layers.linear import linear, linear_part
from flowhn_jax.layers.ssm_biases import USUAL, SSMBiases
from flowhn_jax.layers.ssm_init import dt_bias_init, uniform
from flowhn_jax.layers.state_space import SequenceInputs, StateSpaceMixer
from flowhn_jax.split import Selection, take
from flowhn_jax.split.cost import conv_flops, ssd_flops
from flowhn_jax.split.selection import EVERYTHING
from kernels.partition import constrain
from kernels.ssd import ssd, ssd_step

_A_MIN, _A_MAX = 1.0, 16.0  # of the initial decay rates, as in the authors' code


GATED_NORMS = ("none", "before_gate", "after_gate")


class GatedRMSNorm(nnx.Module):
    """RMS norm over each of G groups of channels, and the gate, in float32.

    It is RMS(x * silu(gate)) or, with `before_gate`, RMS(x) * silu(gate).
    """

    def __init__(self, features: int, groups: int, *, epsilon: float, before_gate: bool = False):
        self.groups = groups
        self.epsilon = epsilon
        self.before_gate = before_gate
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """Return the normed channels [..., E] in float32, for x and gate [..., E]."""
        x, gate = x.astype(jnp.float32), jax.nn.silu(gate.astype(jnp.float32))
        if self.before_gate:
            return self._normalize(x) * gate
        return self._normalize(x * gate)

    def _normalize(self, x: jax.Array) -> jax.Array:
        by_group = x.reshape(*x.shape[:-1], self.groups, -1)
        mean_square = jnp.square(by_group).mean(-1, keepdims=True)
        normed = by_group * jax.lax.rsqrt(mean_square + self.epsilon)
        return normed.reshape(x.shape) * self.scale[...]


class Mamba2Sizes(NamedTuple):
    """Sizes of a Mamba-2 mixer: D, E, S, W, P and G."""

    width: int
    inner: int
    state: int
    conv: int
    head_dim: int
    groups: int


class Mamba2Cache(NamedTuple):
    """What the next token needs of the tokens so far.

    Attributes:
      conv: [B, W - 1, E + 2 G S], the convolution's last inputs.
      state: [B, H, P, S] float32, of the scan.
    """

    conv: jax.Array
    state: jax.Array


class SSDArguments(NamedTuple):
    """Arguments of Mamba-2's scan: x [..., H, P], dt [..., H], B and C [..., G, S].

    Named as in `kernels.ssd`. A, D and dt_bias [H] are parameters; dt_bias is None where dt already
    contains it.
    """

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array
    dt_bias: jax.Array | None


class Mamba2Multipliers(NamedTuple):
    """Factors on the parts of in_proj's result (Falcon-H1, arXiv 2507.22448)."""

    z: float
    x: float
    B: float
    C: float
    dt: float


class Mamba2(StateSpaceMixer[Mamba2Cache]):
    """State space with one decay per head: E channels in H heads of P, with P x S states each.

    The heads of each of G groups share B and C, and their channels are normed together. Decays, the
    state and the norm are float32 whatever `context.dtype` is. A `Mixer`.

    Options:
      gated_norm: the RMS norm of the scan's outputs, one of `GATED_NORMS`: 'before_gate' or
        'after_gate', where the gate is silu(z), or 'none', the gate alone.
      multipliers: factors on the parts of in_proj's result.
      biases: which parts have a bias.
      dt_limits: smallest and largest time step, after the softplus; None: no limit.
    """

    def __init__(
        self,
        sizes: Mamba2Sizes,
        context: LayerContext,
        *,
        gated_norm: str = "after_gate",
        multipliers: Mamba2Multipliers | None = None,
        biases: SSMBiases = USUAL,
        dt_limits: tuple[float, float] | None = None,
    ):
        width, inner, state, conv, head_dim, groups = sizes
        if inner % (head_dim * groups):
            raise ValueError(
                f"Mamba2: {inner} channels must be whole heads of {head_dim} in {groups} equal "
                "groups"
            )
        rngs = context.rngs
        self.inner, self.state, self.conv, self.dtype = inner, state, conv, context.dtype
        self.head_dim, self.groups = head_dim, groups
        self.norms, self.multipliers = gated_norm != "none", multipliers
        self.dt_limits = dt_limits
        heads = inner // head_dim
        convolved = inner + 2 * groups * state
        self.splits = (inner, inner + convolved)  # of in_proj's result: z; x, B and C; dt
        self.convolved_splits = (inner, inner + groups * state)
        self.in_proj = linear(width, inner + convolved + heads, context, bias=biases.in_proj)
        self.out_proj = linear(inner, width, context, bias=biases.out_proj)
        if self.norms:
            before_gate = gated_norm == "before_gate"
            self.norm = GatedRMSNorm(
                inner, groups, epsilon=context.norm_eps, before_gate=before_gate
            )
        self.conv_weight = nnx.Param(uniform(rngs.params(), (conv, convolved), conv**-0.5))
        self.conv_bias = nnx.Param(jnp.zeros(convolved)) if biases.conv else None
        self.dt_bias = nnx.Param(dt_bias_init(rngs.params(), heads))
        decay = jax.random.uniform(rngs.params(), (heads,), minval=_A_MIN, maxval=_A_MAX)
        self.a_log = nnx.Param(jnp.log(decay))
        self.d = nnx.Param(jnp.ones(heads))

    def _mix(self, inputs: SequenceInputs) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """See `StateSpaceMixer`; the states are computed for prompts only."""
        x, segment_ids, prompts, selection = inputs
        if selection == EVERYTHING:
            z, xbc, dt = self._project_in(x)
        else:
            z, (xbc, dt) = self._project_gates(take(x, selection)), self._project_to_scan(x)
        scanned = self._ssd_arguments(self._convolve(xbc, segment_ids), dt)
        if prompts is None:
            y = cast("jax.Array", ssd(**scanned._asdict(), segment_ids=segment_ids))
            return self._project_out(_select(y, selection), z), xbc, None
        scanned = scanned._replace(dt=prompts.mask_padding(scanned.dt))
        y, state = cast(
            "tuple[jax.Array, jax.Array]",
            ssd(**scanned._asdict(), segment_ids=segment_ids, return_final_state=True),
        )
        return self._project_out(_select(y, selection), z), xbc, state

    def _cache(self, conv: jax.Array, state: jax.Array) -> Mamba2Cache:
        return Mamba2Cache(conv, state)

    def init_cache(self, batch: int, length: int) -> Mamba2Cache:
        """Return the cache before the first token; its size does not depend on `length`."""
        del length
        channels = self.inner + 2 * self.groups * self.state
        conv = jnp.zeros((batch, self.conv - 1, channels), self.dtype)
        heads = self.inner // self.head_dim
        state = jnp.zeros((batch, heads, self.head_dim, self.state), jnp.float32)
        return Mamba2Cache(conv, state)

    def _advance(self, x: jax.Array, cache: Mamba2Cache) -> tuple[jax.Array, Mamba2Cache]:
        """See `StateSpaceMixer`."""
        z, xbc, dt = self._project_in(x)
        y, new_cache = self._step(xbc, dt, cache)
        return self._project_out(y, z), new_cache

    def read(self, x: jax.Array, cache: Mamba2Cache) -> tuple[Callable[[], jax.Array], Mamba2Cache]:
        """Return a function that gates and projects the tokens x [B, D], and the new cache."""
        y, new_cache = self._step(*self._project_to_scan(x), cache)
        return lambda: self._project_out(y, self._project_gates(x)), new_cache

    def selected_share(self, name: str) -> float:
        """Return 1 for the output projection, the gates' share of the input's, 0 for others."""
        gates = self.inner / self.in_proj.kernel.shape[1]
        return {"out_proj": 1.0, "in_proj": gates}.get(name, 0.0)

    def _step(
        self, xbc: jax.Array, dt: jax.Array, cache: Mamba2Cache
    ) -> tuple[jax.Array, Mamba2Cache]:
        """Return the scan's outputs [B, H, P] and the new cache."""
        xbc, conv = convolve_step(xbc, self.conv_weight[...], value_of(self.conv_bias), cache.conv)
        y, state = ssd_step(**self._ssd_arguments(xbc, dt)._asdict(), state=cache.state)
        return y, Mamba2Cache(conv, state)

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """Return the FLOPs of the scan and of the convolution."""
        del causal
        channels = self.inner + 2 * self.groups * self.state
        scan = ssd_flops(self.inner, self.state)
        return tokens * (scan + conv_flops(channels, self.conv))

    def _project_in(self, x: jax.Array) -> list[jax.Array]:
        """Return the parts of in_proj's result for x [..., D].

        They are the gates z [..., E], the convolution's inputs x, B and C [..., E + 2 G S], and
        dt [..., H].
        """
        projected = self.in_proj(x)
        if self.multipliers is not None:
            shared = self.groups * self.state
            sizes = self.inner, self.inner, shared, shared, self.inner // self.head_dim
            factors = [
                jnp.full(size, factor, self.dtype)
                for factor, size in zip(self.multipliers, sizes, strict=True)
            ]
            projected = projected * jnp.concatenate(factors)
        return jnp.split(projected, self.splits, axis=-1)

    def _project_gates(self, x: jax.Array) -> jax.Array:
        """Return the gates z [..., E] alone; without multipliers."""
        return linear_part(self.in_proj, x, slice(self.inner))

    def _project_to_scan(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the other parts of in_proj's result, as `_project_in`; without multipliers."""
        assert self.multipliers is None, "models with multipliers have outputs for all tokens"
        projected = linear_part(self.in_proj, x, slice(self.inner, None))
        xbc, dt = jnp.split(projected, [self.splits[1] - self.inner], axis=-1)
        return xbc, dt

    def _convolve(self, xbc: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        xbc = convolve(xbc, self.conv_weight[...], value_of(self.conv_bias), segment_ids)
        # Channels are not sharded before x, B and C are taken apart: shards would not be whole
        # heads.
        return constrain(jax.nn.silu(xbc), "B L C")

    def _ssd_arguments(self, xbc: jax.Array, dt: jax.Array) -> SSDArguments:
        """Return the scan's arguments for convolved channels xbc [..., E + 2 G S]."""
        x, b, c = jnp.split(xbc, self.convolved_splits, axis=-1)
        x = x.reshape(*x.shape[:-1], -1, self.head_dim)
        b, c = (v.reshape(*v.shape[:-1], self.groups, -1) for v in (b, c))
        rates, bias = decay_rates(self.a_log[...]), self.dt_bias[...]
        if self.dt_limits is None:
            return SSDArguments(x, dt, rates, b, c, self.d[...], bias)
        # The softplus, which the scan applies, is monotone: limits of its argument are limits of
        # the time step.
        low, high = map(_inverse_softplus, self.dt_limits)
        dt = jnp.clip(dt.astype(jnp.float32) + bias, low, high)
        return SSDArguments(x, dt, rates, b, c, self.d[...], None)

    def _project_out(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """Return the mixed tokens [..., D] of y [..., H, P], gated by z [..., E]."""
        y = y.reshape(z.shape)
        return self.out_proj(self.norm(y, z) if self.norms else y * jax.nn.silu(z))


def _inverse_softplus(value: float) -> float:
    """Return the x with softplus(x) = value; -inf for 0, inf for inf."""
    return value + math.log(-math.expm1(-value)) if value > 0 else -math.inf


def _select(y: jax.Array, selection: Selection) -> jax.Array:
    """Return the selected positions of y [B, T, ...]."""
    return y if selection == EVERYTHING else take(y, selection)
