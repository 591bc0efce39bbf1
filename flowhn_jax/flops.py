"""Analytic FLOPs of a model, peak FLOP/s of a chip, and model FLOPs utilisation (MFU).

One walk over a model's layers counts the tokens that each really gets, by the conventions of
`split/cost.py`, with two names for two conventions of attention scores: causal-halved (the work
that has to be done) and PaLM-style (all T² pairs; arXiv 2204.02311, appendix B). Training is three
forward passes.
"""

import math

import jax
from flax import nnx

from flowhn_jax import models
from flowhn_jax.config import ModelConfig

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets; TPU v7x has two a chip.
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


def forward_flops(config: ModelConfig, length: int, *, causal: bool = True) -> int:
    """FLOPs of one forward pass over one sequence of `length` tokens, head included."""
    parts = models.abstract_model(config).parts(length)
    return sum(_part_flops(part, tokens, causal) for part, tokens in parts)


def prefill_flops(config: ModelConfig, length: int, *, causal: bool = True) -> int:
    """FLOPs of a forward pass whose head runs on the last of `length` tokens alone."""
    unscored = 2 * config.width * config.vocab_size * (length - 1)
    return forward_flops(config, length, causal=causal) - unscored


def _part_flops(part: nnx.Module, tokens: int, causal: bool) -> int:
    """Of all matrix products inside it, and of what its mixers do besides."""
    total = 0
    for _, module in nnx.iter_modules(part):
        if isinstance(module, nnx.LinearGeneral):
            total += 2 * tokens * math.prod(module.kernel.shape)
        elif hasattr(module, "mixing_flops"):
            total += module.mixing_flops(tokens, causal=causal)
    return total


def train_flops(config: ModelConfig, length: int, *, causal: bool = True) -> int:
    """FLOPs of forward and backward over one sequence: three times the forward pass."""
    return 3 * forward_flops(config, length, causal=causal)


def peak_flops(device: jax.Device) -> float | None:
    """Peak dense bf16 FLOP/s of `device`, None where it is not known."""
    kind = device.device_kind
    matches = [name for name in _PEAK_FLOPS if kind.startswith(name)]
    return _PEAK_FLOPS[max(matches, key=len)] if matches else None


def utilisation(flops_per_second_per_device: float, device: jax.Device) -> float | None:
    """Share of the device's peak, in 0..1; None where the peak is not known."""
    peak = peak_flops(device)
    return None if peak is None else flops_per_second_per_device / peak
