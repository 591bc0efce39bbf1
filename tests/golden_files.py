"""Golden files: parameters and inputs of other code, and the results that ours must reproduce."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flowhn_jax import models
from flowhn_jax.interop.layout import to_ours

FOLDER = pathlib.Path(__file__).parent / "golden"
# The authors' golden files and their Parallel_Mode.
AUTHORS = {
    "flowhn_no_split_24": "A",
    "flowhn_ae_split_24": "B",
    "flowhn_ae_split_25": "B",
    "flowhn_fa_split_reference_24": "C",
    "flowhn_alternating_reference_25": "D",
}


def read(name):
    """Return all arrays of a golden file, and those of the parameters by their names."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    state_dict = {key[6:]: array for key, array in arrays.items() if key.startswith("param/")}
    return arrays, state_dict


def assert_parity(config, params, arrays, names):
    """Check logits to 3e-5, loss to 1e-5, gradients to 5e-5 of each tensor's maximum, in float32.

    Args:
      config: the model's config.
      params: the model's parameters.
      arrays: of the golden file.
      names: the path of each of our parameters, by their name.
    """
    tokens = arrays["input_ids"]

    def loss(params):
        logits = models.forward(config, params, tokens)
        shifted = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(shifted, tokens[:, 1:, None], axis=2).mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, arrays["logits"], atol=3e-5, rtol=0)
    assert abs(value - arrays["loss"]) < 1e-5
    assert len(names) == len(jax.tree.leaves(params))
    gradients = flatten_dict(gradients)
    for theirs, path in names.items():
        expected = to_ours(path, arrays[f"grad/{theirs}"], gradients[path].ndim)
        error = np.abs(gradients[path] - expected).max() / np.abs(expected).max()
        assert error < 5e-5, theirs
