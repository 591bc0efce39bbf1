import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.interop import reference
from flowhn_jax.interop.layout import to_ours

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
FIXTURES = {
    "flowhn_no_split_24": "A",
    "flowhn_ae_split_24": "B",
    "flowhn_ae_split_25": "B",
    "flowhn_fa_split_reference_24": "C",
    "flowhn_alternating_reference_25": "D",
}


def read(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    state_dict = {key[6:]: array for key, array in arrays.items() if key.startswith("param/")}
    return arrays, state_dict


@pytest.mark.parametrize(("name", "mode"), FIXTURES.items())
def test_parity_with_the_authors_code(name, mode):
    """Logits to 3e-5, loss to 1e-5, gradients to 5e-5 of each tensor's maximum, in float32."""
    arrays, state_dict = read(name)
    assert json.loads(str(arrays["config"]))["Prallel_Mode"] == mode
    config, params = reference.load(state_dict, mode, heads=4)
    tokens = arrays["input_ids"]

    def loss(params):
        logits = models.forward(config, params, tokens)
        shifted = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(shifted, tokens[:, 1:, None], axis=2).mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, arrays["logits"], atol=3e-5, rtol=0)
    assert abs(value - arrays["loss"]) < 1e-5
    names = reference.parameter_names(config.blocks)
    assert len(names) == len(jax.tree.leaves(params))
    for theirs, path in names.items():
        ours = gradients
        for key in path:
            ours = ours[key]
        expected = to_ours(path, arrays[f"grad/{theirs}"], ours.ndim)
        error = np.abs(ours - expected).max() / np.abs(expected).max()
        assert error < 5e-5, theirs


def test_npz_file(tmp_path):
    arrays, state_dict = read("flowhn_ae_split_24")
    np.savez(tmp_path / "model.npz", **state_dict)
    config, params = reference.load(tmp_path / "model.npz", "B", heads=4)
    logits = models.forward(config, params, arrays["input_ids"])
    np.testing.assert_allclose(logits, arrays["logits"], atol=3e-5, rtol=0)


def test_bad_npz_files(tmp_path):
    """Above all one with a pickle, which is never loaded."""
    path = tmp_path / "authors.npz"
    np.savez(path, weights=np.array([{"a": 1}], object))
    for content in (path.read_bytes(), b"", b"PK\x03\x04", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"authors\.npz' is not an \.npz file of arrays"):
            reference.load(path, "A")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="holds one array without a name"):
        reference.load(path, "A")


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"'E'; accepted are A, B, C, D"):
        reference.load(read("flowhn_ae_split_24")[1], "E")


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz.*\.npz or a \.pth"):
        reference.load("nowhere.npz", "A")


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"do not divide into 5 heads.*heads="):
        reference.load(read("flowhn_ae_split_24")[1], "B", heads=5)


def test_small_width_needs_the_number_of_heads():
    with pytest.raises(ValueError, match=r"Width 32 is too small .* give it with heads="):
        reference.load(read("flowhn_ae_split_24")[1], "B")


def test_mode_of_another_checkpoint():
    """no_split's fusion is twice as wide: loading it as a split says which tensor differs."""
    with pytest.raises(ValueError, match=r"branch_proj.weight has shape \(32, 64\)"):
        reference.load(read("flowhn_no_split_24")[1], "B", heads=4)


def test_missing_and_unknown_names():
    state_dict = read("flowhn_ae_split_24")[1]
    renamed = dict(state_dict)
    renamed["model.layers.1.extra.weight"] = renamed.pop("model.layers.1.final_proj.weight")
    with pytest.raises(
        ValueError, match=r"missing \['model.layers.1.final_proj.weight'\], unknown"
    ):
        reference.load(renamed, "B", heads=4)
    with pytest.raises(ValueError, match=r"lacks .* parameters"):
        reference.load({"weight": np.zeros(3)}, "A")


def test_pth_file(tmp_path):
    torch = pytest.importorskip("torch")
    arrays, state_dict = read("flowhn_ae_split_24")
    torch.save({key: torch.tensor(array) for key, array in state_dict.items()}, tmp_path / "m.pth")
    config, params = reference.load(tmp_path / "m.pth", "B", heads=4)
    logits = models.forward(config, params, arrays["input_ids"])
    np.testing.assert_allclose(logits, arrays["logits"], atol=3e-5, rtol=0)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match="pickled model runs code"):
        reference.load(tmp_path / "whole.pth", "B")


def test_pth_without_torch_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "m.pth").write_bytes(b"")
    with pytest.raises(ImportError, match="pip install torch"):
        reference.load(tmp_path / "m.pth", "B")
