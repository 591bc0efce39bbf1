"""Peers to measure next to our kernels: published implementations that are installed.

A peer takes a case's arrays and provides two functions to time, forward and forward with backward,
that return when the device is done. It computes the same outputs from the same inputs.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowhn_jax.bench import pytorch
from flowhn_jax.bench.case import Case
from flowhn_jax.bench.throughput import memory_sizes

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer's implementation of a case."""

    name: str
    forward: Run  # returns the output
    both: Run  # forward and backward
    to_numpy: Callable[[Any], np.ndarray] = np.asarray  # of the output
    temporary_bytes: Callable[[], int] | None = None  # of `both`, if known


def _associative_scan(case: Case) -> Peer:
    """Return one `jax.lax.associative_scan` over all positions, differentiated by JAX."""

    def run(u, dt, A, B, C, D, z, dt_bias):
        delta = jax.nn.softplus(dt + dt_bias)
        decay = jnp.exp(delta[..., None] * A)
        x = (delta * u)[..., None] * B[:, :, None, :]

        def compose(first, second):
            return first[0] * second[0], second[0] * first[1] + second[1]

        h = jax.lax.associative_scan(compose, (decay, x), axis=1)[1]
        y = (h * C[:, :, None, :]).sum(-1) + D * u
        return (y * jax.nn.silu(z)).astype(u.dtype)

    def with_gradients(inputs, cotangent):
        return jax.vjp(lambda inputs: run(**inputs), inputs)[1](cotangent)

    forward = jax.jit(lambda inputs: run(**inputs))
    both = jax.jit(with_gradients).lower(case.inputs, case.cotangent).compile()
    return Peer(
        "jax.lax.associative_scan",
        lambda: forward(case.inputs),
        lambda: both(case.inputs, case.cotangent),
        temporary_bytes=lambda: memory_sizes(both).temp_size_in_bytes,
    )


def _torch_peer(
    name: str,
    case: Case,
    run: Callable[..., Any],
    prepare: Callable[[Any], Any] = lambda x: x,
    restore: Callable[[Any], Any] = lambda x: x,
) -> Peer:
    """Return a peer that calls a PyTorch function, on the GPU if PyTorch has one.

    Args:
      name: the name of the peer.
      case: the case to compute.
      run: the function, of the case's inputs by name.
      prepare: brings each input and the cotangent into the layout of `run`; not timed.
      restore: brings the output back into the case's layout; not timed.
    """
    import torch

    device = pytorch.device()

    def tensor(x: Any) -> Any:
        # PyTorch does not accept NumPy's bfloat16.
        wide = np.array(x, np.float32) if x.dtype == jnp.bfloat16 else np.array(x)
        return prepare(torch.from_numpy(wide).to(device, getattr(torch, x.dtype.name)))

    tensors = {name: tensor(x) for name, x in case.inputs.items()}
    floats = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]
    cotangent = tensor(case.cotangent)

    def forward() -> Any:
        with torch.no_grad():
            output = run(**tensors)
        pytorch.wait()
        return output

    def both() -> None:
        torch.autograd.grad(run(**tensors), floats, cotangent)
        pytorch.wait()

    return Peer(name, forward, both, lambda output: restore(output).float().cpu().numpy())


def _mambapy(case: Case) -> Peer:
    """Return mambapy's parallel scan in PyTorch, called as its MambaBlock calls it."""
    import torch
    from mambapy.pscan import pscan

    def run(u, dt, A, B, C, D, z, dt_bias):
        delta = torch.nn.functional.softplus(dt + dt_bias)
        decay = torch.exp(delta.unsqueeze(-1) * A)
        x = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        y = (pscan(decay, x) @ C.unsqueeze(-1)).squeeze(3) + D * u
        return y * torch.nn.functional.silu(z)

    return _torch_peer("mambapy pscan", case, run)


def _mamba_ssm(case: Case) -> Peer:
    """Return the CUDA kernel of the Mamba authors."""
    import torch

    selective_scan_fn = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def run(u, dt, A, B, C, D, z, dt_bias):
        return selective_scan_fn(u, dt, A, B, C, D, z, dt_bias, delta_softplus=True)

    def channels_first(x):
        """Return u, dt, B, C and z as the kernel requires them, all in u's dtype."""
        dtype = getattr(torch, case.inputs["u"].dtype.name)
        return x.to(dtype).transpose(1, 2).contiguous() if x.ndim == 3 else x

    return _torch_peer("mamba-ssm CUDA", case, run, channels_first, lambda y: y.transpose(1, 2))


def _torch_attention(case: Case) -> Peer:
    """Return the attention kernel that PyTorch chooses."""
    import torch

    def run(q, k, v, segment_ids=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None
        if segment_ids is not None:
            mask = (segment_ids[:, :, None] == segment_ids[:, None, :]).tril()[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out.transpose(1, 2)

    return _torch_peer("torch scaled_dot_product_attention", case, run)


def _flash_attention(case: Case) -> Peer:
    """Return FlashAttention-2's CUDA kernel."""
    flash_attn_func = import_module("flash_attn").flash_attn_func
    return _torch_peer("flash-attn", case, partial(flash_attn_func, causal=True))


def _transformers_mamba2(chunk: int, case: Case) -> Peer:
    """Return the chunked scan of transformers' Mamba-2, PyTorch without CUDA kernels."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def run(x, dt, A, B, C, D):
        return mamba2_chunk_scan(x, dt, A, B, C, chunk, D=D, dt_softplus=True)

    return _torch_peer(f"transformers Mamba2, chunks of {chunk}", case, run)


def _mamba_ssm_ssd(case: Case) -> Peer:
    """Return the Triton kernels of the Mamba-2 authors, in chunks of 256 as in their layer."""
    module = import_module("mamba_ssm.ops.triton.ssd_combined")
    mamba_chunk_scan_combined = module.mamba_chunk_scan_combined

    def run(x, dt, A, B, C, D):
        return mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_softplus=True)

    return _torch_peer("mamba-ssm Triton", case, run)


def _simple_gla(case: Case) -> Peer:
    """Return flash-linear-attention's Triton kernels for linear attention with decay per head.

    With state h [S, P] they compute h_t = exp(g_t) h_{t-1} + k_t v_t^T and y_t = h_t^T q_t, which
    is SSD with q = C, k = B, v = delta x and g = delta A. They take one q and one k per head.
    """
    import torch

    chunk_simple_gla = import_module("fla.ops.simple_gla").chunk_simple_gla

    def run(x, dt, A, B, C, D):
        delta = torch.nn.functional.softplus(dt)
        k, q = (y.repeat_interleave(x.shape[2] // y.shape[2], dim=2) for y in (B, C))
        v = (delta[..., None] * x).to(x.dtype)
        y, _ = chunk_simple_gla(q, k, v, delta * A, scale=1.0)
        return (y + D[:, None] * x).to(x.dtype)

    return _torch_peer("flash-linear-attention simple_gla", case, run)


def _suits_flash_attention(case: Case) -> bool:
    """Return whether flash-attn can compute a case: 16 bits, no segment ids."""
    return case.inputs["q"].dtype == jnp.bfloat16 and "segment_ids" not in case.inputs


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A peer that may be installed."""

    package: str
    make: Callable[[Case], Peer]
    needs_gpu: bool = False  # that PyTorch can use
    suits: Callable[[Case], bool] = lambda case: True


_CANDIDATES = {  # by operation
    "selective_scan": (
        _Candidate("jax", _associative_scan),
        _Candidate("mambapy", _mambapy),
        _Candidate("mamba_ssm", _mamba_ssm, needs_gpu=True),
    ),
    "attention": (
        _Candidate("torch", _torch_attention),
        _Candidate("flash_attn", _flash_attention, needs_gpu=True, suits=_suits_flash_attention),
    ),
    "ssd": (
        _Candidate("transformers", partial(_transformers_mamba2, 256)),  # their default
        _Candidate("transformers", partial(_transformers_mamba2, 64)),
        _Candidate("mamba_ssm", _mamba_ssm_ssd, needs_gpu=True),
        _Candidate("fla", _simple_gla, needs_gpu=True),
    ),
}


def peers(case: Case) -> Iterator[Callable[[], Peer]]:
    """Yield a function that makes a peer, for each peer of a case that can run on this machine.

    Making and running a peer may fail. Packages that are not installed, that need a GPU which
    PyTorch does not have, or that cannot compute the case are left out.
    """
    for candidate in _CANDIDATES.get(case.operation, ()):
        if not _is_installed(candidate.package) or not candidate.suits(case):
            continue
        if candidate.needs_gpu and not _has_torch_gpu():
            continue
        yield partial(candidate.make, case)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_torch_gpu() -> bool:
    return _is_installed("torch") and pytorch.device() == "cuda"
