"""A benchmark case: an operation at a shape, its minimal work, a float64 sample of its results."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flowhn_jax.bench import sampled_reference
from flowhn_jax.bench.device import LeastWork
from kernels.attention import attention
from kernels.causal_conv import causal_conv
from kernels.cross_entropy import cross_entropy
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd

Arrays = dict[str, Array]

SSD_HEAD = 64  # channels per head, Mamba-2's default (arXiv 2405.21060, section 9)
_SAMPLED_CHANNELS = 16
_SAMPLED_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation at one shape, with arrays to run it on.

    Attributes:
      operation: one of `cases.OPERATION_NAMES`.
      size: one of `cases.SIZES`.
      shape: the dimensions, for tables.
      inputs: arrays by name; floats are differentiated.
      cotangent: the cotangent of the output.
      sampled_cotangent: zero outside the sample, so that its gradients depend on the sample alone.
      run: (**inputs, backend) -> output.
      forward: minimal work of the forward pass.
      both: minimal work of forward and backward together.
      sample: returns the expected (output, gradients) of the sample, in float64.
      pick_output: takes the sample out of a whole output.
      pick_gradients: takes the sample out of whole gradients.
    """

    operation: str
    size: str
    shape: str
    inputs: Arrays
    cotangent: Array
    sampled_cotangent: Array
    run: Callable[..., Any]
    forward: LeastWork
    both: LeastWork
    sample: Callable[[], tuple[Any, Any]]
    pick_output: Callable[[Any], Any]
    pick_gradients: Callable[[Arrays], Any]

    @functools.cached_property
    def _expected(self) -> tuple[Any, Any]:
        return self.sample()

    def output_error(self, output: Any) -> float:
        """Return the largest error of the output, relative to the largest magnitude."""
        return _largest_error(self.pick_output(output), self._expected[0])

    def gradient_error(self, gradients: Arrays) -> float:
        """Return the largest relative error of any gradient for `sampled_cotangent`."""
        return _largest_error(self.pick_gradients(gradients), self._expected[1])


def _largest_error(found: Any, expected: Any) -> float:
    return max(
        float(np.max(np.abs(_f64(a) - e)) / np.max(np.abs(e)))
        for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _some(size: int, count: int) -> np.ndarray:
    """Return at most `count` evenly spaced integers of 0..size-1."""
    return np.unique(np.linspace(0, size - 1, count, dtype=int))


def _nbytes(*arrays: Array) -> int:
    return sum(x.nbytes for x in arrays)


def _floats(inputs: Arrays) -> list[Array]:
    return [x for x in inputs.values() if jnp.issubdtype(x.dtype, jnp.floating)]


def _least_bytes(inputs: Arrays, output: Array) -> tuple[int, int]:
    """Return the bytes of forward, and of forward and backward together.

    Backward reads everything again and writes the gradients.
    """
    forward = _nbytes(*inputs.values(), output)
    return forward, 2 * forward + _nbytes(*_floats(inputs))


class _Random:
    """Normal random arrays, each from its own key."""

    def __init__(self, dtype: str):
        self._key, self._dtype = jax.random.key(0), dtype

    def __call__(self, *shape: int, dtype: str | None = None) -> Array:
        self._key, key = jax.random.split(self._key)
        return jax.random.normal(key, shape, dtype or self._dtype)


def selective_scan_case(
    size: str, batch: int, length: int, inner: int, state: int, dtype: str
) -> Case:
    """Return a case of the selective scan, with gate and bias of dt."""
    random = _Random(dtype)
    inputs = {
        "u": random(batch, length, inner),
        "dt": random(batch, length, inner, dtype="float32") - 2,
        "A": -jnp.exp(random(inner, state, dtype="float32")),
        "B": random(batch, length, state, dtype="float32"),
        "C": random(batch, length, state, dtype="float32"),
        "D": random(inner, dtype="float32"),
        "z": random(batch, length, inner),
        "dt_bias": random(inner, dtype="float32"),
    }
    cotangent = random(batch, length, inner)
    some = _some(inner, _SAMPLED_CHANNELS)

    def pick(arrays: Arrays) -> Arrays:
        """Return the sampled channels of the first sequence."""
        first = {name: arrays[name][0][:, some] for name in ("u", "dt", "z")}
        first |= {name: arrays[name][0] for name in ("B", "C")}
        return first | {name: arrays[name][some] for name in ("A", "D", "dt_bias")}

    def sample() -> tuple[Any, Any]:
        first = {name: _f64(x) for name, x in pick(inputs).items()}
        return sampled_reference.selective_scan(**first, dy=_f64(cotangent[0][:, some]))

    exps = batch * length * inner * state
    forward, both = _least_bytes(inputs, cotangent)
    return Case(
        "selective_scan",
        size,
        f"B={batch} L={length} E={inner} S={state}",
        inputs,
        cotangent,
        jnp.zeros_like(cotangent).at[0, :, some].set(cotangent[0][:, some].T),
        selective_scan,
        LeastWork(forward, 0, exps),
        LeastWork(both, 0, 2 * exps),
        sample,
        lambda y: y[0][:, some],
        pick,
    )


def ssd_case(size: str, batch: int, length: int, heads: int, state: int, dtype: str) -> Case:
    """Return a case of SSD, with one group."""
    random = _Random(dtype)
    inputs = {
        "x": random(batch, length, heads, SSD_HEAD),
        "dt": random(batch, length, heads, dtype="float32") - 2,
        "A": -jnp.exp(random(heads, dtype="float32")),
        "B": random(batch, length, 1, state),
        "C": random(batch, length, 1, state),
        "D": random(heads, dtype="float32"),
    }
    cotangent = random(batch, length, heads, SSD_HEAD)
    some = slice(_SAMPLED_CHANNELS)

    def pick(arrays: Arrays) -> Arrays:
        """Return the sampled channels of the first sequence's first head."""
        first = {name: arrays[name][0, :, 0] for name in ("dt", "B", "C")}
        return first | {"x": arrays["x"][0, :, 0, some], "A": arrays["A"][0], "D": arrays["D"][0]}

    def sample() -> tuple[Any, Any]:
        first = {name: _f64(x) for name, x in pick(inputs).items()}
        return sampled_reference.ssd(**first, dy=_f64(cotangent[0, :, 0, some]))

    # The recurrence as products: each token's x B^T into the state, the state times C out of it.
    flops = 4 * batch * length * heads * SSD_HEAD * state
    forward, both = _least_bytes(inputs, cotangent)
    return Case(
        "ssd",
        size,
        f"B={batch} L={length} H={heads} P={SSD_HEAD} S={state}",
        inputs,
        cotangent,
        jnp.zeros_like(cotangent).at[0, :, 0, some].set(cotangent[0, :, 0, some]),
        ssd,
        LeastWork(forward, flops, batch * length * heads),
        LeastWork(both, 3 * flops, 2 * batch * length * heads),
        sample,
        lambda y: y[0, :, 0, some],
        pick,
    )


def attention_case(
    size: str,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    *,
    documents: bool = False,
) -> Case:
    """Return a case of attention; `documents` adds segment ids, all of one document."""
    random = _Random(dtype)
    inputs = {
        "q": random(batch, length, heads, head_dim),
        "k": random(batch, length, kv_heads, head_dim),
        "v": random(batch, length, kv_heads, head_dim),
    }
    if documents:
        inputs["segment_ids"] = jnp.ones((batch, length), jnp.int32)
    cotangent = random(batch, length, heads, head_dim)
    rows = _some(length, _SAMPLED_ROWS)

    def pick(arrays: Arrays) -> Arrays:
        """Return the first sequence's first head: sampled queries, all keys and values."""
        return {"q": arrays["q"][0, rows, 0], **{name: arrays[name][0, :, 0] for name in "kv"}}

    def sample() -> tuple[Any, Any]:
        first = {name: _f64(x) for name, x in pick(inputs).items()}
        return sampled_reference.attention(
            **first, positions=rows, dout=_f64(cotangent[0, rows, 0])
        )

    pairs = batch * heads * length * (length + 1) // 2
    forward, both = _least_bytes(inputs, cotangent)
    return Case(
        "attention",
        size,
        f"B={batch} T={length} H={heads}/{kv_heads} K={head_dim}" + (" ids" if documents else ""),
        inputs,
        cotangent,
        jnp.zeros_like(cotangent).at[0, rows, 0].set(cotangent[0, rows, 0]),
        attention,
        LeastWork(forward, 4 * head_dim * pairs, pairs),
        # Backward: scores again, and the gradients of weights, values, queries and keys.
        LeastWork(both, 14 * head_dim * pairs, 2 * pairs),
        sample,
        lambda out: out[0, rows, 0],
        pick,
    )


def cross_entropy_case(size: str, tokens: int, width: int, vocabulary: int, dtype: str) -> Case:
    """Return a case of the fused head and cross-entropy."""
    random = _Random(dtype)
    some = _some(tokens, _SAMPLED_ROWS)
    inputs = {
        "hidden": random(tokens, width),
        "head": random(width, vocabulary, dtype="float32") / math.sqrt(width),
        "targets": jnp.arange(tokens) * 31 % vocabulary,
        # Only the sampled tokens count in the sum; all are computed whatever their weight.
        "weights": jnp.zeros(tokens).at[some].set(1),
    }
    cotangent = jnp.ones(())

    def sample() -> tuple[Any, Any]:
        # The operation casts the head to hidden's dtype.
        head = _f64(inputs["head"].astype(dtype))
        hidden = _f64(inputs["hidden"][some])
        targets, weights = (np.asarray(inputs[name])[some] for name in ("targets", "weights"))
        return sampled_reference.cross_entropy(hidden, head, targets, weights)

    flops, exps = 2 * tokens * width * vocabulary, tokens * vocabulary
    forward, both = _least_bytes(inputs, cotangent)
    return Case(
        "cross_entropy",
        size,
        f"N={tokens} D={width} V={vocabulary}",
        inputs,
        cotangent,
        cotangent,
        cross_entropy,
        LeastWork(forward, flops, exps),
        LeastWork(both, 3 * flops, exps),
        sample,
        lambda loss: loss,
        lambda grads: grads | {name: grads[name][some] for name in ("hidden", "weights")},
    )


def causal_conv_case(size: str, batch: int, length: int, inner: int, taps: int, dtype: str) -> Case:
    """Return a case of the causal convolution."""
    random = _Random(dtype)
    inputs = {
        "x": random(batch, length, inner),
        "weight": random(taps, inner, dtype="float32"),
        "bias": random(inner, dtype="float32"),
    }
    cotangent = random(batch, length, inner)
    some = slice(_SAMPLED_CHANNELS)

    def pick(arrays: Arrays) -> Arrays:
        """Return the sampled channels of the first sequence."""
        first = {"x": arrays["x"][0, :, some], "weight": arrays["weight"][:, some]}
        return first | {"bias": arrays["bias"][some]}

    def sample() -> tuple[Any, Any]:
        first = {name: _f64(x) for name, x in pick(inputs).items()}
        return sampled_reference.causal_conv(**first, dy=_f64(cotangent[0, :, some]))

    forward, both = _least_bytes(inputs, cotangent)
    return Case(
        "causal_conv",
        size,
        f"B={batch} L={length} E={inner} W={taps}",
        inputs,
        cotangent,
        jnp.zeros_like(cotangent).at[0, :, some].set(cotangent[0, :, some]),
        lambda *, backend, **inputs: causal_conv(**inputs),
        LeastWork(forward, 0, 0),
        LeastWork(both, 0, 0),
        sample,
        lambda y: y[0, :, some],
        pick,
    )
