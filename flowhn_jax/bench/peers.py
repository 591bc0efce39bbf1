"""Peers to measure beside our kernels: what others publish, where it is installed.

A peer takes a case's arrays and gives two functions to time, forward and forward with backward,
that return when the device is done. It is to compute the same outputs from the same inputs.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowhn_jax.bench import pytorch
from flowhn_jax.bench.cases import Case

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer's way to do a case."""

    name: str
    forward: Run  # returns the output
    both: Run  # forward and backward
    to_numpy: Callable[[Any], np.ndarray] = np.asarray  # of the output
    temporary_bytes: Callable[[], int] | None = None  # of `both`, where it is known


def _associative_scan(case: Case) -> Peer:
    """The scan as one `jax.lax.associative_scan` over all positions, differentiated by JAX."""

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
        temporary_bytes=lambda: both.memory_analysis().temp_size_in_bytes,
    )


def _torch_peer(
    name: str,
    case: Case,
    run: Callable[..., Any],
    prepare: Callable[[Any], Any] = lambda x: x,
    restore: Callable[[Any], Any] = lambda x: x,
) -> Peer:
    """A PyTorch function of the case's inputs by name, on the GPU where PyTorch has one.

    `prepare` lays each input and the cotangent out as the function wants them, `restore` lays the
    output out again; neither is timed.
    """
    import torch

    device = pytorch.device()

    def tensor(x: Any) -> Any:
        # NumPy's bfloat16 is not one that PyTorch takes.
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
    """The parallel scan of mambapy in PyTorch, as its MambaBlock calls it."""
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
    """The CUDA kernel of the Mamba authors."""
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def run(u, dt, A, B, C, D, z, dt_bias):
        return selective_scan_fn(u, dt, A, B, C, D, z, dt_bias, delta_softplus=True)

    def channels_first(x):
        """As the kernel wants u, dt, B, C and z, all of u's dtype."""
        dtype = getattr(torch, case.inputs["u"].dtype.name)
        return x.to(dtype).transpose(1, 2).contiguous() if x.ndim == 3 else x

    return _torch_peer("mamba-ssm CUDA", case, run, channels_first, lambda y: y.transpose(1, 2))


def _torch_attention(case: Case) -> Peer:
    """PyTorch's own choice of attention kernel."""
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
    """FlashAttention-2's CUDA kernel."""
    from flash_attn import flash_attn_func

    return _torch_peer("flash-attn", case, partial(flash_attn_func, causal=True))


def _transformers_mamba2(chunk: int, case: Case) -> Peer:
    """The chunked scan of Hugging Face transformers' Mamba-2 in PyTorch, without CUDA kernels."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def run(x, dt, A, B, C, D):
        return mamba2_chunk_scan(x, dt, A, B, C, chunk, D=D, dt_softplus=True)

    return _torch_peer(f"transformers Mamba2, chunks of {chunk}", case, run)


def _mamba_ssm_ssd(case: Case) -> Peer:
    """The Triton kernels of the Mamba-2 authors, in chunks of 256 as their Mamba2 layer."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def run(x, dt, A, B, C, D):
        return mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_softplus=True)

    return _torch_peer("mamba-ssm Triton", case, run)


def _simple_gla(case: Case) -> Peer:
    """Flash-linear-attention's Triton kernels for linear attention with one decay per head.

    With state h [S, P] they compute h_t = exp(g_t) h_{t-1} + k_t v_t^T and y_t = h_t^T q_t, which
    is SSD where q = C, k = B, v = delta x and g = delta A. They take a q and a k for each head.
    """
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    def run(x, dt, A, B, C, D):
        delta = torch.nn.functional.softplus(dt)
        k, q = (y.repeat_interleave(x.shape[2] // y.shape[2], dim=2) for y in (B, C))
        v = (delta[..., None] * x).to(x.dtype)
        y, _ = chunk_simple_gla(q, k, v, delta * A, scale=1.0)
        return (y + D[:, None] * x).to(x.dtype)

    return _torch_peer("flash-linear-attention simple_gla", case, run)


def _suits_flash_attention(case: Case) -> bool:
    """Whether flash-attn computes a case: in 16 bits, without segment ids."""
    return case.inputs["q"].dtype == jnp.bfloat16 and "segment_ids" not in case.inputs


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A peer that may be installed."""

    package: str
    make: Callable[[Case], Peer]
    needs_gpu: bool = False  # one that PyTorch can use
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
    """Yield what makes each of a case's peers that can run here; making or running it may fail.

    Left out are packages that are not installed, those that need a GPU where PyTorch has none, and
    those that do not compute the case.
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
