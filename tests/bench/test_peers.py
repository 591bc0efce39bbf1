"""Peers that need a GPU, with naive PyTorch functions in place of their packages."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax.bench import case as case_lib
from flowhn_jax.bench import peers
from kernels.ssd import ssd

torch = pytest.importorskip("torch")


@pytest.fixture
def install(monkeypatch):
    """Return a function that replaces a package's module by one with a single function."""

    def put(module, function):
        stub = types.ModuleType(module)
        setattr(stub, function.__name__, function)
        monkeypatch.setitem(sys.modules, module, stub)

    return put


def run(peer):
    """Run forward and backward; return the output as a NumPy array."""
    peer.both()
    return peer.to_numpy(peer.forward())


def names(case):
    return [make.func.__name__ for make in peers.peers(case)]


def recurrence(decay, inputs, readout):
    """Return y_t = h_t readout_t with h_t = decay_t h_{t-1} + inputs_t, over axis 1."""
    state, outputs = 0, []
    for t in range(decay.shape[1]):
        state = decay[:, t] * state + inputs[:, t]
        outputs.append((state @ readout[:, t, ..., None])[..., 0])
    return torch.stack(outputs, dim=1)


def test_mamba_ssm_selective_scan(install):
    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert delta_softplus
        assert all(x.is_contiguous() for x in (u, delta, B, C, z))
        u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
        delta = torch.nn.functional.softplus(delta + delta_bias)
        inputs = (delta * u)[..., None] * B[:, :, None]
        y = recurrence(torch.exp(delta[..., None] * A), inputs, C) + D * u
        return (y * torch.nn.functional.silu(z)).transpose(1, 2)

    install("mamba_ssm.ops.selective_scan_interface", selective_scan_fn)
    case = case_lib.selective_scan_case("small", 2, 33, 20, 4, "float32")
    assert case.output_error(run(peers._mamba_ssm(case))) < 1e-5


def ssd_case(groups, dtype="float32"):
    """Return a case of four heads in groups."""
    case = case_lib.ssd_case("small", 2, 70, 4, 8, dtype)
    shared = {name: case.inputs[name] for name in ("B", "C")}
    shared = {
        name: jax.random.normal(jax.random.key(i), (*x.shape[:2], groups, x.shape[3]), dtype)
        for i, (name, x) in enumerate(shared.items())
    }
    return dataclasses.replace(case, inputs=case.inputs | shared)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba_ssm_ssd(install, groups):
    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, dt_softplus=False):
        assert chunk_size == 256
        assert dt_softplus
        delta = torch.nn.functional.softplus(dt)
        B, C = (y.repeat_interleave(x.shape[2] // groups, dim=2) for y in (B, C))
        inputs = (delta[..., None] * x)[..., None] * B[..., None, :]
        return recurrence(torch.exp(delta * A)[..., None, None], inputs, C) + D[:, None] * x

    install("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined)
    case = ssd_case(groups)
    y = run(peers._mamba_ssm_ssd(case))
    np.testing.assert_allclose(y, ssd(**case.inputs), atol=1e-4)


@pytest.mark.parametrize(("groups", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_simple_gla(install, groups, dtype):
    """Compare with the recurrence that flash-linear-attention documents, in float32."""

    def chunk_simple_gla(q, k, v, g, scale):
        assert q.shape == k.shape == (*v.shape[:3], 8)
        assert g.shape == v.shape[:3]
        assert q.dtype == k.dtype == v.dtype == getattr(torch, dtype)
        assert g.dtype == torch.float32
        q, k, v = (x.float() for x in (q, k, v))
        inputs = v[..., None] * k[..., None, :]  # [B, T, H, V, K]
        y = recurrence(torch.exp(g)[..., None, None], inputs, scale * q)
        return y.to(getattr(torch, dtype)), None

    install("fla.ops.simple_gla", chunk_simple_gla)
    case = ssd_case(groups, dtype)
    y = run(peers._simple_gla(case))
    expected = ssd(**{name: x.astype(jnp.float32) for name, x in case.inputs.items()})
    tolerance = 1e-4 if dtype == "float32" else 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(y, expected, atol=tolerance)


def test_flash_attention(install):
    def flash_attn_func(q, k, v, causal=False):
        assert causal
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    install("flash_attn", flash_attn_func)
    case = case_lib.attention_case("small", 2, 70, 4, 2, 8, "bfloat16")
    assert case.output_error(run(peers._flash_attention(case))) < 0.02


@pytest.fixture
def everything_installed(monkeypatch):
    monkeypatch.setattr(peers, "_is_installed", lambda package: True)
    return monkeypatch


def test_peers_that_need_a_gpu_are_left_out_without_one(everything_installed):
    everything_installed.setattr(peers, "_has_torch_gpu", lambda: False)
    scan = case_lib.selective_scan_case("small", 1, 4, 4, 4, "float32")
    attention = case_lib.attention_case("small", 1, 8, 2, 1, 8, "bfloat16")
    assert names(scan) == ["_associative_scan", "_mambapy"]
    assert names(attention) == ["_torch_attention"]
    assert names(ssd_case(1)) == 2 * ["_transformers_mamba2"]
    everything_installed.setattr(peers, "_has_torch_gpu", lambda: True)
    assert names(scan) == ["_associative_scan", "_mambapy", "_mamba_ssm"]
    assert names(attention) == ["_torch_attention", "_flash_attention"]
    assert names(ssd_case(1))[2:] == ["_mamba_ssm_ssd", "_simple_gla"]


def test_flash_attention_is_left_out_of_cases_that_it_does_not_support(everything_installed):
    everything_installed.setattr(peers, "_has_torch_gpu", lambda: True)
    wide = case_lib.attention_case("small", 1, 8, 2, 1, 8, "float32")
    documents = case_lib.attention_case("small", 1, 8, 2, 1, 8, "bfloat16", documents=True)
    assert names(wide) == names(documents) == ["_torch_attention"]


def test_peers_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(peers, "_is_installed", lambda package: package == "jax")
    case = case_lib.selective_scan_case("small", 1, 4, 4, 4, "float32")
    assert names(case) == ["_associative_scan"]
