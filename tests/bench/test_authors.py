import dataclasses
import math

import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.bench import authors, authors_model
from flowhn_jax.bench.throughput import random_batch
from flowhn_jax.interop import reference
from flowhn_jax.parallel.mesh import make_mesh
from tests import golden_files
from tests.small import small_baseline, small_config

torch = pytest.importorskip("torch")


def read(name, mode):
    """Return the fixture's arrays and our module with its parameters."""
    arrays, state_dict = golden_files.read(name)
    module = authors.build(reference.infer_config(state_dict, mode, heads=4), mode)
    module.load_state_dict({key: torch.tensor(array) for key, array in state_dict.items()})
    return arrays, module


def assert_parity(arrays, module):
    """Check logits to 3e-5, loss to 1e-5 and gradients to 5e-5 of each tensor's maximum."""
    tokens = torch.tensor(arrays["input_ids"]).long()
    logits = module(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    np.testing.assert_allclose(logits.detach(), arrays["logits"], atol=3e-5, rtol=0)
    assert abs(loss.item() - arrays["loss"]) < 1e-5
    parameters = dict(module.named_parameters())
    assert parameters.keys() == {key[5:] for key in arrays if key.startswith("grad/")}
    for key, parameter in parameters.items():
        expected = arrays[f"grad/{key}"]
        error = np.abs(parameter.grad.numpy() - expected).max() / np.abs(expected).max()
        assert error < 5e-5, key


@pytest.mark.parametrize(("name", "mode"), golden_files.AUTHORS.items())
def test_parity_with_the_authors_code(name, mode):
    assert_parity(*read(name, mode))


def naive_selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Compute mamba_ssm's selective_scan_fn with the dtype checks of its CUDA kernel."""
    assert {x.dtype for x in (u, delta, B, C, z)} == {u.dtype}
    assert {x.dtype for x in (A, D, delta_bias)} == {torch.float32}
    assert delta_softplus
    delta = torch.nn.functional.softplus(delta.float() + delta_bias[:, None])
    state, outputs = 0, []
    for t in range(u.shape[-1]):
        inputs = (delta * u)[:, :, t, None] * B[:, None, :, t]
        state = torch.exp(delta[:, :, t, None] * A) * state + inputs
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1) + D[:, None] * u
    return (y * torch.nn.functional.silu(z)).to(u.dtype)


def naive_causal_conv(x, weight, bias=None, activation=None):
    """Compute causal_conv1d's causal_conv1d_fn."""
    assert activation == "silu"
    taps, length = weight.shape[1], x.shape[-1]
    x = torch.nn.functional.pad(x, (taps - 1, 0))
    y = sum(x[..., i : i + length] * weight[:, i, None] for i in range(taps)) + bias[:, None]
    return torch.nn.functional.silu(y).to(x.dtype)


@pytest.fixture
def cuda_kernels(monkeypatch):
    """Replace the CUDA packages by naive functions; return the names of those that are called."""
    called = []

    def kernel(module, name, tensor):
        called.append(name)
        return {"selective_scan_fn": naive_selective_scan, "causal_conv1d_fn": naive_causal_conv}[
            name
        ]

    monkeypatch.setattr(authors_model, "_cuda_kernel", kernel)
    return called


def test_parity_with_the_arguments_of_the_cuda_kernels(cuda_kernels):
    assert_parity(*read("flowhn_ae_split_25", "B"))
    assert cuda_kernels == 3 * ["causal_conv1d_fn", "selective_scan_fn"]


def test_the_cuda_kernels_receive_one_dtype_under_autocast(cuda_kernels):
    """Jamba's norms give B and C in float32, the projections u, dt and z in bfloat16."""
    model = small_config("ae_split").model
    _, both = authors.block_runs(model, "B", 2, 8, "bfloat16")
    assert all(gradient.isfinite().all() for gradient in both())


def test_parameter_counts_are_those_of_the_authors_model():
    for mode, strategy in reference.MODES.items():
        config = small_config(strategy, split={"scope": "sequence"})
        module = authors.build(config.model, mode)
        count = sum(parameter.numel() for parameter in module.parameters())
        assert count == models.param_count(config.model)


@pytest.mark.parametrize("mode", reference.MODES)
def test_runs_of_a_block(mode):
    model = small_config("ae_split").model
    forward, both = authors.block_runs(model, mode, 2, 9, "float32")
    y, gradients = forward(), both()
    assert y.shape == gradients[0].shape == (2, 9, model.width)
    outside_the_block = 3  # embedding, final norm and head
    assert len(gradients) == 1 + len(reference.parameter_names(1)) - outside_the_block
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    wide = authors.block_runs(model, mode, 2, 9, "bfloat16")[0]()
    error = (wide - y).abs().max() / y.abs().max()
    assert 1e-4 < error < 0.05


def test_first_loss_of_training_is_that_of_the_random_batch():
    config = small_config("ae_split", model={"context": 6})
    step = authors.train_step(config, "B")
    mesh = make_mesh(config.mesh, config.train.batch_size)
    tokens = torch.tensor(np.asarray(random_batch(config, mesh)["tokens"])).long()
    with torch.no_grad():
        logits = authors.build(config.model, "B")(tokens[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    losses = [step() for _ in range(20)]
    assert losses[0] == pytest.approx(expected.item(), abs=1e-5)
    assert losses[0] == pytest.approx(math.log(257), abs=1)
    assert losses[-1] < losses[0] - 0.02


def test_training_without_clipping_and_in_bfloat16():
    config = small_config("ae_split", train={"clip_norm": 0.0}, model={"dtype": "bfloat16"})
    step = authors.train_step(config, "D")
    assert step() > step()


def test_models_that_the_authors_code_lacks_are_rejected():
    model = small_config("ae_split").model
    with pytest.raises(ValueError, match="mode must be one of A, B, C, D; got 'E'"):
        authors.build(model, "E")
    with pytest.raises(ValueError, match="dtype must be 'bfloat16' or 'float32'; got 'float16'"):
        authors.block_runs(model, "A", 1, 8, "float16")
    with pytest.raises(ValueError, match=r"model.branch_mlp must be True"):
        authors.build(dataclasses.replace(model, branch_mlp=False), "A")
    with pytest.raises(ValueError, match=r"model.ssm must be 'mamba1'.*got 'mamba2'"):
        authors.build(dataclasses.replace(model, ssm="mamba2", ssm_head_dim=8), "A")
    with pytest.raises(ValueError, match=r"must be 'flowhn' for the authors' code; got 'llama'"):
        authors.build(small_baseline("llama"), "A")


def test_kernels_are_described_without_a_gpu():
    if not torch.cuda.is_available():
        expected = "scan: a loop over tokens, convolution: torch conv1d"
        assert authors_model.describe_kernels() == expected
