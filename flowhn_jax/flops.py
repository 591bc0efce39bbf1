"""Analytic FLOPs of a model, peak FLOP/s of a chip, and model FLOPs utilisation (MFU).

Counted from the tokens that each branch really gets, by the conventions of `split/cost.py`, with
two names for two conventions of attention scores: causal-halved (the work that has to be done) and
PaLM-style (all T² pairs; arXiv 2204.02311, appendix B). Training is three forward passes.
"""

import jax

from flowhn_jax.config import ModelConfig
from flowhn_jax.split import attention_branch_flops, ssm_branch_flops

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
    dims, width = config.dims, config.width
    total = 2 * width * config.vocab_size * length
    for block in config.plan(length).blocks:
        total += attention_branch_flops(dims, block.attention.count(length), causal=causal)
        total += ssm_branch_flops(dims, block.ssm.count(length))
        fused_width = width if block.is_split else 2 * width
        total += 2 * length * width * (fused_width + width)
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
