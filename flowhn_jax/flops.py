"""Analytic FLOPs and bytes of a model, peaks of a chip, and model FLOPs utilisation (MFU).

A walk over a model's layers counts the tokens that each one gets, by the conventions of
`split/cost.py`. Attention scores have two conventions: causal (half of the pairs, the work that is
needed) and PaLM-style (all T² pairs; arXiv 2204.02311, appendix B). A training step is three
forward passes.
"""

import math
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from flax import nnx

from flowhn_jax import models
from flowhn_jax.layers.attention import KVCache
from flowhn_jax.layers.embedding import Embedding
from flowhn_jax.layers.mamba1 import Mamba1Cache
from flowhn_jax.layers.mamba2 import Mamba2Cache
from flowhn_jax.layers.router import Router
from flowhn_jax.models import ModelConfig
from flowhn_jax.models.language_model import FlopPart

if TYPE_CHECKING:
    from jaxlib._jax import Device  # to a type checker jax.Device is a variable

_Entry = TypeVar("_Entry")
_CACHES = KVCache, Mamba1Cache, Mamba2Cache

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets; a TPU v7x chip is two devices.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
}

# Bytes per second of one JAX device's memory, from the same sources.
_PEAK_BANDWIDTH = {
    "TPU v4": 1228e9,
    "TPU v5 lite": 819e9,
    "TPU v5e": 819e9,
    "TPU v5": 2765e9,
    "TPU v5p": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU v6e": 1640e9,
    "TPU7x": 7380e9 / 2,
    "NVIDIA A100-SXM4-40GB": 1555e9,
    "NVIDIA A100-PCIE-40GB": 1555e9,
    "NVIDIA A100-SXM4-80GB": 2039e9,
    "NVIDIA A100 80GB PCIe": 1935e9,
    "NVIDIA H100": 3350e9,
    "NVIDIA H100 NVL": 3938e9,
    "NVIDIA H100 PCIe": 2000e9,
    "NVIDIA H200": 4800e9,
    "NVIDIA B200": 8000e9,
}

# Clock in Hz and TensorCores of one JAX device. The clock is the peak FLOP/s divided by those per
# cycle of the matrix units: per core 4 of 128 x 128, of a v6e 4 of 256 x 256.
_TENSOR_CORES = {
    "TPU v4": (1.05e9, 2),
    "TPU v5 lite": (1.503e9, 1),
    "TPU v5e": (1.503e9, 1),
    "TPU v5": (1.75e9, 2),
    "TPU v5p": (1.75e9, 2),
    "TPU v6 lite": (1.75e9, 1),
    "TPU v6e": (1.75e9, 1),
}


def forward_flops(config: ModelConfig, length: int, *, causal: bool = True) -> int:
    """Return the FLOPs of a forward pass over one sequence of `length` tokens, head included."""
    parts = models.abstract_model(config).flop_parts(length)
    return sum(_part_flops(part, causal) for part in parts)


def prefill_flops(config: ModelConfig, length: int, *, causal: bool = True) -> int:
    """Return the FLOPs of a forward pass whose head runs only on the last of `length` tokens."""
    unscored = 2 * config.width * config.vocab_size * (length - 1)
    return forward_flops(config, length, causal=causal) - unscored


def _part_flops(part: FlopPart, causal: bool) -> int:
    """Return the FLOPs of all matrix products in a part of a model and of its mixers' mixing."""
    total, mixers = 0, {}
    for path, module in nnx.iter_modules(part.module):
        if shape := _product_shape(module):
            total += 2 * _passing_tokens(part, path) * math.prod(shape)
        elif hasattr(module, "mixing_flops"):
            mixers[path] = module
    read = part.tokens if part.read is None else part.read
    for path, mixer in mixers.items():
        # A mixer that is made of others counts theirs.
        if read and not any(path[:depth] in mixers for depth in range(len(path))):
            passing = _passing_tokens(part, (*path, "mixing"))
            mixing = mixer.mixing_flops(read, causal=causal)
            total += mixing if passing == read else mixing * passing / read
    return round(total)


def _passing_tokens(part: FlopPart, path: tuple[Any, ...]) -> float:
    """Return the tokens that pass a layer of a part; for a share of the layer, the share counts."""
    if part.read in (None, part.tokens):
        return part.tokens
    share = 1.0
    for module_path, module in nnx.iter_modules(part.module):
        depth = len(module_path)
        selected_share = getattr(module, "selected_share", None)
        if path[:depth] == module_path and selected_share is not None:
            share = selected_share(path[depth])
    return share * part.tokens + (1 - share) * part.read


def _product_shape(module: nnx.Module) -> tuple[int, ...] | None:
    """Return the shape [in, *out] of the weight in a module's product; None if it has none.

    A router has one output, its score.

    An embedding is a part that costs FLOPs (`flop_parts`) only where the head is tied to it.
    """
    if isinstance(module, nnx.LinearGeneral):
        return module.kernel.shape
    if isinstance(module, Router):
        return *module.weight.shape, 1
    return module.embedding.shape[::-1] if isinstance(module, Embedding) else None


def train_flops(config: ModelConfig, length: int, *, causal: bool = True) -> int:
    """Return the FLOPs of forward and backward over one sequence: three times the forward pass."""
    return 3 * forward_flops(config, length, causal=causal)


def train_bytes(
    config: ModelConfig, batch: int, length: int, *, devices: int = 1, tensor: int = 1
) -> float:
    """Return the fewest bytes per device that a train step of `batch` sequences can move.

    Each product with a weight reads its factors and writes its result once, forward and twice
    backward, in the dtype of products, but the head's logits are never written. Parameters and
    AdamW's two means are read and written once, in float32.

    Args:
      config: the config of the model.
      batch: sequences of all devices.
      length: tokens per sequence.
      devices: the number that share tokens and state evenly.
      tensor: devices that share each weight's products.
    """
    model = models.abstract_model(config)
    total = 2 * 3 * 4 * models.param_count(config) / devices
    for part in model.flop_parts(length):
        for path, module in nnx.iter_modules(part.module):
            if shape := _product_shape(module):
                weight, inputs = math.prod(shape), shape[0]
                tokens = _passing_tokens(part, path)
                ends = inputs if part.module is model.output_layer else inputs + weight // inputs
                numbers = weight / tensor + batch * tokens * ends / devices
                total += 3 * config.compute_dtype.itemsize * numbers
    return total


def decode_bytes(config: ModelConfig, batch: int, length: int) -> float:
    """Return the fewest bytes that one decode step of `batch` sequences can move.

    Each layer's parameters are read once, in the dtype that they are used in, and so are keys and
    values; states are read and written. For a split block it is the mean over positions, with all
    sequences at the same one: a branch without a token reads nothing.

    Args:
      config: the config of a model that can decode.
      batch: number of sequences.
      length: tokens per sequence that the caches are made for.
    """
    model = models.abstract_model(config)
    product_bytes = config.compute_dtype.itemsize
    total = 0.0
    for part in model.flop_parts(length):
        params = nnx.to_pure_dict(nnx.state(part.module))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            itemsize = product_bytes if models.is_matrix(path) else leaf.dtype.itemsize
            passing = _passing_tokens(part, tuple(key.key for key in path))
            total += min(1.0, passing / length) * leaf.size * itemsize
    caches = jax.eval_shape(lambda: models.build(config).init_cache(batch, length)).blocks
    for cache, plan in zip(caches, config.block_plans(length), strict=True):
        for part in jax.tree.leaves(cache, is_leaf=lambda part: isinstance(part, _CACHES)):
            is_attention = isinstance(part, KVCache)
            # Of attention's cache, steps without an output read nothing; states always change.
            share = (plan.attention if is_attention else plan.reads[1]).count(length) / length
            passes = 1 if is_attention else 2
            total += share * passes * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part))
    return total


def peak_flops(device: "Device") -> float | None:
    """Return the peak dense bf16 FLOP/s of a device; None where it is unknown."""
    return _by_device_kind(_PEAK_FLOPS, device)


def peak_bandwidth(device: "Device") -> float | None:
    """Return the bytes per second of a device's memory; None where they are unknown."""
    return _by_device_kind(_PEAK_BANDWIDTH, device)


def tensor_cores(device: "Device") -> tuple[float, int] | None:
    """Return the clock in Hz and the number of TensorCores of a TPU; None where it is unknown."""
    return _by_device_kind(_TENSOR_CORES, device)


def _by_device_kind(table: dict[str, _Entry], device: "Device") -> _Entry | None:
    """Return the entry whose name is the longest prefix of the device's kind."""
    matches = [name for name in table if device.device_kind.startswith(name)]
    return table[max(matches, key=len)] if matches else None


def utilisation(flops_per_second_per_device: float, device: "Device") -> float | None:
    """Return the share of the device's peak, in 0..1; None where the peak is unknown."""
    peak = peak_flops(device)
    return None if peak is None else flops_per_second_per_device / peak
