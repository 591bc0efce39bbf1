import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from flowhn_jax.layers.linear import rms_norm
from flowhn_jax.layers.mamba2 import GatedRMSNorm, Mamba2

FIXTURE = pathlib.Path(__file__).parent.parent / "golden" / "hf_mamba2_24.npz"
MIXER_NAMES = {
    "in_proj.weight": ("in_proj", "kernel"),
    "out_proj.weight": ("out_proj", "kernel"),
    "conv1d.weight": ("conv_weight",),
    "conv1d.bias": ("conv_bias",),
    "norm.weight": ("norm", "scale"),
    "dt_bias": ("dt_bias",),
    "A_log": ("a_log",),
    "D": ("d",),
}


class Stack(nnx.Module):
    """Hugging Face's Mamba-2 language model, of our layers."""

    def __init__(self, config):
        width, rngs = config["hidden_size"], nnx.Rngs(0)
        vocab_size, depth = config["vocab_size"], config["num_hidden_layers"]

        def norm():
            return rms_norm(width, epsilon=config["layer_norm_epsilon"], rngs=rngs)

        self.embed = nnx.Embed(vocab_size, width, rngs=rngs)
        self.norms = nnx.List([norm() for _ in range(depth)])
        self.mixers = nnx.List([mixer(config, rngs) for _ in range(depth)])
        self.final_norm = norm()
        self.head = nnx.Linear(width, vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(self.final_norm(x))


def mixer(config, rngs):
    return Mamba2(
        config["hidden_size"],
        config["expand"] * config["hidden_size"],
        config["state_size"],
        config["conv_kernel"],
        config["head_dim"],
        config["n_groups"],
        norm_eps=config["layer_norm_epsilon"],
        init_std=config["initializer_range"],
        dtype=jnp.float32,
        rngs=rngs,
    )


def our_path(name):
    """Path in the state of `Stack` of a parameter of Hugging Face's."""
    parts = name.removeprefix("backbone.").split(".", 3)
    if parts[0] != "layers":
        paths = {"embeddings": ("embed", "embedding"), "norm_f": ("final_norm", "scale")}
        return (paths | {"lm_head": ("head", "kernel")})[parts[0]]
    layer, kind, rest = int(parts[1]), parts[2], parts[3]
    return ("norms", layer, "scale") if kind == "norm" else ("mixers", layer, *MIXER_NAMES[rest])


def our_layout(name, array):
    if "conv1d.weight" in name:
        return array[:, 0].T
    return array.T if "proj" in name or "lm_head" in name else array


def small_mixer(groups=2, dtype=jnp.float32, **sizes):
    sizes = dict(width=8, inner=24, state=4, conv=4, head_dim=4) | sizes
    return Mamba2(
        **sizes, groups=groups, norm_eps=1e-5, init_std=0.2, dtype=dtype, rngs=nnx.Rngs(0)
    )


@nnx.jit
def apply(model, *arguments):
    return model(*arguments)


def test_parity_with_hugging_face():
    """Logits to 3e-5, loss to 1e-5, gradients to 5e-5 of each tensor's maximum, in float32."""
    with np.load(FIXTURE, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    names = [key.removeprefix("param/") for key in arrays if key.startswith("param/")]
    config = json.loads(str(arrays["config"]))
    graph, state = nnx.split(nnx.eval_shape(lambda: Stack(config)))
    params = flatten_dict(nnx.to_pure_dict(state))
    assert params.keys() == {our_path(name) for name in names}
    for name in names:
        params[our_path(name)] = jnp.asarray(our_layout(name, arrays[f"param/{name}"]))
    tokens = arrays["input_ids"]

    def loss(params):
        model = nnx.merge(graph, unflatten_dict(params))
        logits = model(tokens)
        shifted = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(shifted, tokens[:, 1:, None], axis=2).mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, arrays["logits"], atol=3e-5, rtol=0)
    assert abs(value - arrays["loss"]) < 1e-5
    for name in names:
        expected = our_layout(name, arrays[f"grad/{name}"])
        error = np.abs(gradients[our_path(name)] - expected).max() / np.abs(expected).max()
        assert error < 5e-5, name


def test_each_group_is_normed_by_itself():
    rng = np.random.default_rng()
    x, gate = (rng.standard_normal((2, 5, 12)).astype(np.float32) for _ in range(2))
    norm = GatedRMSNorm(12, 3, epsilon=1e-5)
    norm.scale[...] = jnp.asarray(rng.standard_normal(12), jnp.float32)
    gated = x * (gate / (1 + np.exp(-gate.astype(np.float64))))
    by_group = gated.reshape(2, 5, 3, 4)
    expected = by_group / np.sqrt((by_group**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected.reshape(2, 5, 12) * np.asarray(norm.scale[...])
    np.testing.assert_allclose(norm(x, gate), expected, rtol=1e-5, atol=1e-6)


def test_packed_documents_are_computed_apart():
    model = small_mixer()
    x = jnp.asarray(np.random.default_rng().standard_normal((2, 10, 8)), jnp.float32)
    packed = apply(model, x.reshape(1, 20, 8), jnp.asarray([[3] * 10 + [5] * 10]))
    np.testing.assert_allclose(packed.reshape(x.shape), apply(model, x), rtol=1e-4, atol=1e-6)


def test_initial_values():
    model = small_mixer(inner=256)
    steps = jax.nn.softplus(model.dt_bias[...])
    assert 0.99e-3 < steps.min() < steps.max() < 1.01e-1
    rates = jnp.exp(model.a_log[...])
    assert 0.99 < rates.min() < 4 < 12 < rates.max() < 16.01
    np.testing.assert_array_equal(model.d[...], 1)
    assert jnp.abs(model.conv_weight[...]).max() <= 0.5


def test_bfloat16():
    x = jnp.asarray(np.random.default_rng().standard_normal((2, 20, 8)), jnp.float32)
    model = small_mixer(dtype=jnp.bfloat16)
    y = apply(model, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    expected = apply(small_mixer(), x)
    assert jnp.abs(y - expected).max() < 0.05 * jnp.abs(expected).max()


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="24 channels are not heads of 5 in 2 equal groups"):
        small_mixer(head_dim=5)
