"""The FlowHN authors' PyTorch model, restated from its public design.

The authors modified Hugging Face's Jamba (transformers 4.49). Everything that determines the speed
of their code is kept: eager PyTorch, two branches that run one after the other on one stream, the
CUDA kernels that Jamba calls if they are installed, and its loop over the tokens if they are not.
The parameters have the authors' names, so that their state dicts load with `load_state_dict`.

Shapes: B batch, T tokens, D width, E channels of the Mamba mixer, S state size, V vocabulary.
PyTorch is imported by the functions that need it.
"""

import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flowhn_jax.bench import pytorch
from flowhn_jax.config import FlowHNConfig

_ATTENTION_SHARE = 0.59  # of mode C, a constant in the authors' code
_SCAN = "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"
_CONV = "causal_conv1d", "causal_conv1d_fn"


def describe_kernels() -> str:
    """Return the implementations of the scan and the convolution, for the benchmark's output."""
    on_gpu = pytorch.device() == "cuda"
    scan = "mamba_ssm" if on_gpu and _installed(*_SCAN) else "a loop over tokens"
    conv = "causal_conv1d" if on_gpu and _installed(*_CONV) else "torch conv1d"
    return f"scan: {scan}, convolution: {conv}"


@functools.cache
def _installed(module: str, name: str) -> Callable[..., Any] | None:
    """Return a function of an optional package, None if it is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def _cuda_kernel(module: str, name: str, tensor: Any) -> Callable[..., Any] | None:
    """Return a function of a CUDA package if the tensor is on a GPU, else None."""
    return _installed(module, name) if tensor.is_cuda else None


def _split(mode: str, index: int, length: int) -> tuple[int, bool]:
    """Return where block `index` splits the positions, and whether attention comes first."""
    is_odd = index % 2 == 1
    match mode:
        case "B":
            return length // 2, is_odd
        case "C":
            return int(_ATTENTION_SHARE * length), True
        case "D":
            return (length // 2 if is_odd else length - length // 2), is_odd
    raise ValueError(f"mode {mode!r} does not split the positions.")


@functools.cache
def modules() -> SimpleNamespace:
    """Return the classes `FlowHN` and `Block`, defined here because PyTorch is optional."""
    import torch
    from torch import nn
    from torch.nn.functional import linear, scaled_dot_product_attention, silu, softplus

    class RMSNorm(nn.Module):
        """Jamba's RMS norm: normalize in float32, then cast, then scale."""

        def __init__(self, size: int, eps: float):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))
            self.eps = eps

        def forward(self, x):
            wide = x.float()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return self.weight * normed.to(x.dtype)

    class MLP(nn.Module):
        """SwiGLU."""

        def __init__(self, model: FlowHNConfig):
            super().__init__()
            self.gate_proj = nn.Linear(model.width, model.mlp_width, bias=False)
            self.up_proj = nn.Linear(model.width, model.mlp_width, bias=False)
            self.down_proj = nn.Linear(model.mlp_width, model.width, bias=False)

        def forward(self, x):
            return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))

    class Attention(nn.Module):
        """Causal grouped-query attention without position embeddings."""

        def __init__(self, model: FlowHNConfig):
            super().__init__()
            dims = model.dims
            self.head_dim, self.queries_per_kv = dims.head_dim, dims.heads // dims.kv_heads
            q_width, kv_width = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
            self.q_proj = nn.Linear(dims.width, q_width, bias=False)
            self.k_proj = nn.Linear(dims.width, kv_width, bias=False)
            self.v_proj = nn.Linear(dims.width, kv_width, bias=False)
            self.o_proj = nn.Linear(q_width, dims.width, bias=False)

        def forward(self, x):
            projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected)
            # As in Jamba; not all of PyTorch's kernels accept grouped heads.
            k, v = (y.repeat_interleave(self.queries_per_kv, dim=1) for y in (k, v))
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o_proj(out.transpose(1, 2).flatten(2))

    class Mamba(nn.Module):
        """Jamba's Mamba-1, with RMS norms on dt, B and C."""

        def __init__(self, model: FlowHNConfig):
            super().__init__()
            dims = model.dims
            self.sizes = [dims.dt_rank, dims.state, dims.state]
            self.in_proj = nn.Linear(dims.width, 2 * dims.inner, bias=False)
            self.conv1d = nn.Conv1d(
                dims.inner, dims.inner, dims.conv, groups=dims.inner, padding=dims.conv - 1
            )
            self.x_proj = nn.Linear(dims.inner, sum(self.sizes), bias=False)
            self.dt_proj = nn.Linear(dims.dt_rank, dims.inner)
            self.dt_layernorm = RMSNorm(dims.dt_rank, model.norm_eps)
            self.b_layernorm = RMSNorm(dims.state, model.norm_eps)
            self.c_layernorm = RMSNorm(dims.state, model.norm_eps)
            decay = torch.arange(1, dims.state + 1, dtype=torch.float32)
            self.A_log = nn.Parameter(decay.log().repeat(dims.inner, 1))
            self.D = nn.Parameter(torch.ones(dims.inner))
            self.out_proj = nn.Linear(dims.inner, dims.width, bias=False)

        def forward(self, x):
            u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
            u = self.convolve(u)
            dt, B, C = self.x_proj(u.transpose(1, 2)).split(self.sizes, dim=-1)
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
            kernel = _cuda_kernel(*_SCAN, u)
            y = self.scan(u, z, dt, B, C) if kernel is None else self.fused(kernel, u, z, dt, B, C)
            return self.out_proj(y.transpose(1, 2))

        def convolve(self, u):
            """Return the causal convolution [B, E, T] of u [B, E, T], after SiLU."""
            if kernel := _cuda_kernel(*_CONV, u):
                return kernel(u, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
            return silu(self.conv1d(u)[..., : u.shape[-1]])

        def fused(self, kernel, u, z, dt, B, C):
            """Return the gated scan [B, E, T] by the CUDA kernel.

            u, z [B, E, T], dt [B, T, R], B, C [B, T, S]. The kernel adds the bias of dt and
            requires all arrays that depend on the tokens in u's dtype.
            """
            dt = linear(dt, self.dt_proj.weight)
            dt, B, C = (y.to(u.dtype).transpose(1, 2) for y in (dt, B, C))
            A, dt_bias = -self.A_log.float().exp(), self.dt_proj.bias.float()
            return kernel(u, dt, A, B, C, self.D.float(), z, dt_bias, delta_softplus=True)

        def scan(self, u, z, dt, B, C):
            """Return the gated scan [B, E, T], token by token.

            u, z [B, E, T], dt [B, T, R], B, C [B, T, S]. As in Jamba, all decays and inputs
            [B, E, T, S] are computed first and indexed in the loop.
            """
            delta = softplus(self.dt_proj(dt)).transpose(1, 2)[..., None]
            decay = torch.exp(-self.A_log.float().exp()[:, None] * delta)
            inputs = delta * B[:, None].float() * u[..., None].float()
            state = torch.zeros_like(inputs[:, :, 0])
            outputs = []
            for t in range(u.shape[-1]):
                state = decay[:, :, t] * state + inputs[:, :, t]
                outputs.append((state @ C[:, t, :, None])[..., 0])
            y = torch.stack(outputs, dim=-1) + u * self.D[:, None]
            return y * silu(z)

    class DecoderLayer(nn.Module):
        """A branch: mixer and MLP, each with a norm before and a residual around it."""

        def __init__(self, model: FlowHNConfig, name: str, mixer: nn.Module):
            super().__init__()
            self.add_module(name, mixer)  # the parameters' names contain `name`
            self.mixer_name = name
            self.feed_forward = MLP(model)
            self.input_layernorm = RMSNorm(model.width, model.norm_eps)
            self.pre_ff_layernorm = RMSNorm(model.width, model.norm_eps)

        def forward(self, x):
            x = x + self.get_submodule(self.mixer_name)(self.input_layernorm(x))
            return x + self.feed_forward(self.pre_ff_layernorm(x))

    class Block(nn.Module):
        """Both branches, one after the other, and the fusion of their outputs."""

        def __init__(self, model: FlowHNConfig, mode: str, index: int):
            super().__init__()
            self.mode, self.index = mode, index
            self.mamba = DecoderLayer(model, "mamba", Mamba(model))
            self.atten = DecoderLayer(model, "self_attn", Attention(model))
            fused_width = 2 * model.width if mode == "A" else model.width
            self.branch_proj = nn.Linear(fused_width, model.width, bias=False)
            self.pre_ff_layernorm = RMSNorm(model.width, model.norm_eps)
            self.final_proj = nn.Linear(model.width, model.width, bias=False)

        def forward(self, x):
            x = x + self.branch_proj(self.branches(x))
            return x + self.final_proj(self.pre_ff_layernorm(x))

        def branches(self, x):
            """Return both branches' outputs: [B, T, 2 D] in mode A, else [B, T, D]."""
            if self.mode == "A":
                return torch.cat((self.mamba(x), self.atten(x)), dim=-1)
            cut, attention_is_first = _split(self.mode, self.index, x.shape[1])
            order = (self.atten, self.mamba) if attention_is_first else (self.mamba, self.atten)
            return torch.cat((order[0](x[:, :cut]), order[1](x[:, cut:])), dim=1)

    class FlowHN(nn.Module):
        """Embedding, blocks, norm and an untied head."""

        def __init__(self, model: FlowHNConfig, mode: str):
            super().__init__()
            layers = nn.ModuleList(Block(model, mode, index) for index in range(model.blocks))
            self.model = nn.ModuleDict(
                {
                    "embed_tokens": nn.Embedding(model.vocab_size, model.width),
                    "layers": layers,
                    "final_layernorm": RMSNorm(model.width, model.norm_eps),
                }
            )
            self.lm_head = nn.Linear(model.width, model.vocab_size, bias=False)

        def forward(self, tokens):
            x = self.model["embed_tokens"](tokens)
            layers: Any = self.model["layers"]
            for block in layers:
                x = block(x)
            return self.lm_head(self.model["final_layernorm"](x))

    return SimpleNamespace(Block=Block, FlowHN=FlowHN)
