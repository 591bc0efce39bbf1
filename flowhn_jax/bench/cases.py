"""What is benchmarked: each operation at a shape, with its least work and its float64 sample."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flowhn_jax import config as config_lib
from flowhn_jax import recipes
from flowhn_jax.bench import reference
from flowhn_jax.bench.device import Work
from flowhn_jax.config import ModelConfig
from kernels.attention import attention
from kernels.causal_conv import causal_conv
from kernels.cross_entropy import cross_entropy
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd

Arrays = dict[str, Array]
SIZES = ("small", "135m", "350m", "1b")
OPERATION_NAMES = ("selective_scan", "ssd", "attention", "cross_entropy", "causal_conv")

_SSD_HEAD, _SSD_STATE = 64, 128  # Mamba-2's own (arXiv 2405.21060, section 9)
_SAMPLED_CHANNELS = 16
_SAMPLED_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation at one shape, with arrays to run it on."""

    operation: str
    size: str  # of SIZES
    shape: str
    inputs: Arrays  # floats are differentiated
    cotangent: Array
    sampled_cotangent: Array  # zero but for what `sample` gives, so that gradients are its own
    run: Callable[..., Array]  # (**inputs, backend) -> output
    forward: Work
    both: Work  # of forward and backward
    sample: Callable[[], tuple[Any, Any]]  # (output, gradients) that are expected, in float64
    pick_output: Callable[[Any], Any]  # those of a whole output that `sample` gives
    pick_gradients: Callable[[Arrays], Any]

    @functools.cached_property
    def _expected(self) -> tuple[Any, Any]:
        return self.sample()

    def output_error(self, output: Any) -> float:
        """Largest error of the output, against the largest magnitude."""
        return _largest_error(self.pick_output(output), self._expected[0])

    def gradient_error(self, gradients: Arrays) -> float:
        """The same of the gradients by `sampled_cotangent`, the largest of all tensors."""
        return _largest_error(self.pick_gradients(gradients), self._expected[1])


def _largest_error(found: Any, expected: Any) -> float:
    return max(
        float(np.max(np.abs(_f64(a) - e)) / np.max(np.abs(e)))
        for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _some(size: int, count: int) -> np.ndarray:
    """So many of 0..size-1, equally far apart."""
    return np.unique(np.linspace(0, size - 1, count, dtype=int))


def _nbytes(*arrays: Array) -> int:
    return sum(x.nbytes for x in arrays)


def _floats(inputs: Arrays) -> list[Array]:
    return [x for x in inputs.values() if jnp.issubdtype(x.dtype, jnp.floating)]


def _least_bytes(inputs: Arrays, output: Array) -> tuple[int, int]:
    """Forward; forward and backward, which reads all again and writes the gradients."""
    forward = _nbytes(*inputs.values(), output)
    return forward, 2 * forward + _nbytes(*_floats(inputs))


class _Random:
    """Normal random arrays, each from a key of its own."""

    def __init__(self, dtype: str):
        self._key, self._dtype = jax.random.key(0), dtype

    def __call__(self, *shape: int, dtype: str | None = None) -> Array:
        self._key, key = jax.random.split(self._key)
        return jax.random.normal(key, shape, dtype or self._dtype)


def model_config(size: str) -> ModelConfig:
    """The paper's model of a size other than 'small'."""
    return config_lib.parse(recipes.load(f"flowhn_{size}")).model


def _selective_scan(size: str, batch: int, length: int, inner: int, state: int, dtype: str) -> Case:
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
        """Some channels of the first sequence."""
        first = {name: arrays[name][0][:, some] for name in ("u", "dt", "z")}
        first |= {name: arrays[name][0] for name in ("B", "C")}
        return first | {name: arrays[name][some] for name in ("A", "D", "dt_bias")}

    def sample() -> tuple[Any, Any]:
        first = {name: _f64(x) for name, x in pick(inputs).items()}
        return reference.selective_scan(**first, dy=_f64(cotangent[0][:, some]))

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
        Work(forward, 0, exps),
        Work(both, 0, 2 * exps),
        sample,
        lambda y: y[0][:, some],
        pick,
    )


def _ssd(size: str, batch: int, length: int, heads: int, state: int, dtype: str) -> Case:
    random = _Random(dtype)
    inputs = {
        "x": random(batch, length, heads, _SSD_HEAD),
        "dt": random(batch, length, heads, dtype="float32") - 2,
        "A": -jnp.exp(random(heads, dtype="float32")),
        "B": random(batch, length, 1, state),
        "C": random(batch, length, 1, state),
        "D": random(heads, dtype="float32"),
    }
    cotangent = random(batch, length, heads, _SSD_HEAD)
    some = slice(_SAMPLED_CHANNELS)

    def pick(arrays: Arrays) -> Arrays:
        """Some channels of the first sequence's first head."""
        first = {name: arrays[name][0, :, 0] for name in ("dt", "B", "C")}
        return first | {"x": arrays["x"][0, :, 0, some], "A": arrays["A"][0], "D": arrays["D"][0]}

    def sample() -> tuple[Any, Any]:
        first = {name: _f64(x) for name, x in pick(inputs).items()}
        return reference.ssd(**first, dy=_f64(cotangent[0, :, 0, some]))

    # The recurrence in products: each token's x B^T into the state, the state times C out of it.
    flops = 4 * batch * length * heads * _SSD_HEAD * state
    forward, both = _least_bytes(inputs, cotangent)
    return Case(
        "ssd",
        size,
        f"B={batch} L={length} H={heads} P={_SSD_HEAD} S={state}",
        inputs,
        cotangent,
        jnp.zeros_like(cotangent).at[0, :, 0, some].set(cotangent[0, :, 0, some]),
        ssd,
        Work(forward, flops, batch * length * heads),
        Work(both, 3 * flops, 2 * batch * length * heads),
        sample,
        lambda y: y[0, :, 0, some],
        pick,
    )


def _attention(
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
    """With documents there is but one, yet a kernel has to look."""
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
        """Some queries of the first sequence's first head, and its keys and values."""
        return {"q": arrays["q"][0, rows, 0], **{name: arrays[name][0, :, 0] for name in "kv"}}

    def sample() -> tuple[Any, Any]:
        first = {name: _f64(x) for name, x in pick(inputs).items()}
        return reference.attention(**first, positions=rows, dout=_f64(cotangent[0, rows, 0]))

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
        Work(forward, 4 * head_dim * pairs, pairs),
        # Backward: scores again, and the gradients of weights, values, queries and keys.
        Work(both, 14 * head_dim * pairs, 2 * pairs),
        sample,
        lambda out: out[0, rows, 0],
        pick,
    )


def _cross_entropy(size: str, tokens: int, width: int, vocabulary: int, dtype: str) -> Case:
    random = _Random(dtype)
    some = _some(tokens, _SAMPLED_ROWS)
    inputs = {
        "hidden": random(tokens, width),
        "head": random(width, vocabulary, dtype="float32") / math.sqrt(width),
        "targets": jnp.arange(tokens) * 31 % vocabulary,
        # A sum over the sampled tokens alone: all are computed whatever they weigh.
        "weights": jnp.zeros(tokens).at[some].set(1),
    }
    cotangent = jnp.ones(())

    def sample() -> tuple[Any, Any]:
        # The products see the head in hidden's dtype.
        head = _f64(inputs["head"].astype(dtype))
        hidden = _f64(inputs["hidden"][some])
        targets, weights = (np.asarray(inputs[name])[some] for name in ("targets", "weights"))
        return reference.cross_entropy(hidden, head, targets, weights)

    flops, exps = 2 * tokens * width * vocabulary, tokens * vocabulary
    forward, both = _least_bytes(inputs, cotangent)
    return Case(
        "cross_entropy",
        size,
        f"N={tokens} D={width} V={vocabulary}",
        inputs,
        cotangent,
        cotangent,
        lambda *, backend, **inputs: cross_entropy(**inputs),
        Work(forward, flops, exps),
        Work(both, 3 * flops, exps),
        sample,
        lambda loss: loss,
        lambda grads: grads | {name: grads[name][some] for name in ("hidden", "weights")},
    )


def _causal_conv(size: str, batch: int, length: int, inner: int, taps: int, dtype: str) -> Case:
    random = _Random(dtype)
    inputs = {
        "x": random(batch, length, inner),
        "weight": random(taps, inner, dtype="float32"),
        "bias": random(inner, dtype="float32"),
    }
    cotangent = random(batch, length, inner)
    some = slice(_SAMPLED_CHANNELS)

    def pick(arrays: Arrays) -> Arrays:
        """Some channels of the first sequence."""
        first = {"x": arrays["x"][0, :, some], "weight": arrays["weight"][:, some]}
        return first | {"bias": arrays["bias"][some]}

    def sample() -> tuple[Any, Any]:
        first = {name: _f64(x) for name, x in pick(inputs).items()}
        return reference.causal_conv(**first, dy=_f64(cotangent[0, :, some]))

    forward, both = _least_bytes(inputs, cotangent)
    return Case(
        "causal_conv",
        size,
        f"B={batch} L={length} E={inner} W={taps}",
        inputs,
        cotangent,
        jnp.zeros_like(cotangent).at[0, :, some].set(cotangent[0, :, some]),
        lambda *, backend, **inputs: causal_conv(**inputs),
        Work(forward, 0, 0),
        Work(both, 0, 0),
        sample,
        lambda y: y[0, :, some],
        pick,
    )


def _small(operation: str, dtype: str) -> Case | None:
    """The shapes at which the project is held against its peers on a CPU."""
    match operation:
        case "selective_scan":
            return _selective_scan("small", 2, 512, 512, 16, dtype)
        case "ssd":
            return _ssd("small", 2, 1024, 8, 64, dtype)
    return None


def _paper(
    operation: str, size: str, batch: int, length: int, dtype: str, *, documents: bool = False
) -> Case:
    config = model_config(size)
    dims = config.dims
    match operation:
        case "selective_scan":
            return _selective_scan(size, batch, length, dims.inner, dims.state, dtype)
        case "ssd":
            return _ssd(size, batch, length, dims.inner // _SSD_HEAD, _SSD_STATE, dtype)
        case "attention":
            heads = dims.heads, dims.kv_heads, dims.head_dim
            return _attention(size, batch, length, *heads, dtype, documents=documents)
        case "cross_entropy":
            tokens = batch * length
            return _cross_entropy(size, tokens, dims.width, config.vocab_size, dtype)
        case "causal_conv":
            return _causal_conv(size, batch, length, dims.inner, dims.conv, dtype)
    raise ValueError(f"No operation {operation!r}; accepted are {', '.join(OPERATION_NAMES)}.")


def cases(
    operations: list[str], sizes: list[str], lengths: list[int], tokens: int, dtype: str
) -> Iterator[Case]:
    """Cases of so many tokens each, made one at a time, as they fill the device.

    Args:
      operations: of OPERATION_NAMES.
      sizes: of SIZES; 'small' has a shape of its own.
      lengths: of the sequences; the batch is tokens / length, at least 1.
      tokens: of a batch.
      dtype: of what the layers compute in it.
    """
    for operation in operations:
        for size in sizes:
            if size == "small":
                if case := _small(operation, dtype):
                    yield case
                continue
            for length in lengths:
                shape = max(1, tokens // length), length
                yield _paper(operation, size, *shape, dtype)
                if operation == "attention":  # other kernels or masks, so measured on their own
                    yield _paper(operation, size, *shape, dtype, documents=True)
                if operation == "cross_entropy":
                    break  # it knows tokens, but no sequences
