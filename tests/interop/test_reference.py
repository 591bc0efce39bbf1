import json
import sys

import jax
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.interop import reference
from flowhn_jax.interop.reference import MODES
from tests.golden_files import AUTHORS, assert_parity, read
from tests.small import small_baseline, small_config

MAMBA2 = small_config(model={"ssm": "mamba2", "ssm_head_dim": 8}).model


@pytest.mark.parametrize(("name", "mode"), AUTHORS.items())
def test_parity_with_the_authors_code(name, mode):
    arrays, state_dict = read(name)
    assert json.loads(str(arrays["config"]))["Prallel_Mode"] == mode
    config, params = reference.load(state_dict, mode, heads=4)
    assert_parity(config, params, arrays, reference.parameter_names(config.blocks))


def test_an_npz_file_is_loaded(tmp_path):
    arrays, state_dict = read("flowhn_ae_split_24")
    np.savez(tmp_path / "model.npz", **state_dict)
    config, params = reference.load(tmp_path / "model.npz", "B", heads=4)
    logits = models.forward(config, params, arrays["input_ids"])
    np.testing.assert_allclose(logits, arrays["logits"], atol=3e-5, rtol=0)


def test_malformed_npz_files_are_refused(tmp_path):
    """Including one with a pickle, which is never loaded."""
    path = tmp_path / "authors.npz"
    np.savez(path, weights=np.array([{"a": 1}], object))
    for content in (path.read_bytes(), b"", b"PK\x03\x04", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"authors\.npz' must be an \.npz file of arrays"):
            reference.load(path, "A")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="holds a single array without a name"):
        reference.load(path, "A")


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"mode must be one of A, B, C, D; got 'E'"):
        reference.load(read("flowhn_ae_split_24")[1], "E")


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"must be an \.npz or a \.pth file; 'nowhere.npz'"):
        reference.load("nowhere.npz", "A")


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"must divide into the 5 heads.*heads="):
        reference.load(read("flowhn_ae_split_24")[1], "B", heads=5)


def test_small_width_needs_the_number_of_heads():
    with pytest.raises(ValueError, match=r"Width 32 is too small .* give it with heads="):
        reference.load(read("flowhn_ae_split_24")[1], "B")


def test_an_array_of_another_rank_is_refused():
    state_dict = dict(read("flowhn_ae_split_24")[1])
    name = "model.layers.0.mamba.mamba.A_log"
    state_dict[name] = state_dict[name].ravel()
    with pytest.raises(ValueError, match=r"A_log must have 2 dimensions; got shape \(\d+,\)"):
        reference.load(state_dict, "B", heads=4)


def test_a_wrong_mode_is_refused():
    """The fusion of no_split is twice as wide; the message names the tensor that differs."""
    with pytest.raises(ValueError, match=r"branch_proj.weight must have shape .* from \(32, 64\)"):
        reference.load(read("flowhn_no_split_24")[1], "B", heads=4)


def test_missing_and_unknown_names_are_refused():
    state_dict = read("flowhn_ae_split_24")[1]
    renamed = dict(state_dict)
    renamed["model.layers.1.extra.weight"] = renamed.pop("model.layers.1.final_proj.weight")
    with pytest.raises(
        ValueError, match=r"missing \['model.layers.1.final_proj.weight'\], unknown"
    ):
        reference.load(renamed, "B", heads=4)
    with pytest.raises(ValueError, match=r"must have all parameters of FlowHN"):
        reference.load({"weight": np.zeros(3)}, "A")


def test_a_pth_file_is_loaded(tmp_path):
    torch = pytest.importorskip("torch")
    arrays, state_dict = read("flowhn_ae_split_24")
    torch.save({key: torch.tensor(array) for key, array in state_dict.items()}, tmp_path / "m.pth")
    config, params = reference.load(tmp_path / "m.pth", "B", heads=4)
    logits = models.forward(config, params, arrays["input_ids"])
    np.testing.assert_allclose(logits, arrays["logits"], atol=3e-5, rtol=0)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match="pickled model runs code"):
        reference.load(tmp_path / "whole.pth", "B")


def test_a_pth_file_needs_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "m.pth").write_bytes(b"")
    with pytest.raises(ImportError, match="pip install torch"):
        reference.load(tmp_path / "m.pth", "B")


@pytest.mark.parametrize("ending", ["npz", "pth"])
@pytest.mark.parametrize(("name", "mode"), AUTHORS.items())
def test_what_is_saved_is_what_their_code_saved(tmp_path, name, mode, ending):
    """Names, shapes and values, there and back."""
    if ending == "pth":
        pytest.importorskip("torch")
    _, state_dict = read(name)
    config, params = reference.load(state_dict, mode, heads=4)
    path = tmp_path / "new" / f"model.{ending}"
    assert MODES[reference.save(path, config, params)] == MODES[mode]
    saved = reference.read_arrays(path)
    assert set(saved) == set(state_dict)
    for key, array in state_dict.items():
        np.testing.assert_array_equal(saved[key], array, key)
    again, loaded = reference.load(path, mode, heads=4)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small_baseline("shm"), "model.kind must be flowhn .* got 'shm'"),
        (MAMBA2, "model.ssm must be mamba1 .* got 'mamba2'"),
        (small_config(model={"branch_mlp": False}).model, "model.branch_mlp must be True"),
        (
            small_config(model={"fusion": "residual"}).model,
            "model.fusion must be paper .*'residual'",
        ),
        (
            small_config(model={"attention_rope_theta": 9.0}).model,
            r"model.attention_rope_theta must be 0 .* got 9.0",
        ),
        (small_config(model={"head_dim": 6}).model, "model.head_dim must be .* got 6"),
        (small_config("fai_split").model, "model.split.strategy must be one of .* got 'fai_split'"),
        (small_config("ae_split", split={"stem": 1}).model, "without a stem.* a stem of 1"),
        (small_config("ae_split", split={"reads": "all"}).model, "a stem of 0 and reads 'all'"),
        (
            small_config("no_split", split={"stem": 1, "stem_kind": "ssm"}).model,
            "without a stem.* a stem of 1",
        ),
    ],
)
def test_models_that_their_code_does_not_have_are_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        reference.save(tmp_path / "model.npz", config, {})


def test_the_table_of_a_tied_model_is_their_head_too(tmp_path):
    """Their code has no tied head; the model that it loads gives the same logits."""
    split = {"scope": "sequence"}
    config = small_config("ae_split", model={"tie_embeddings": True}, split=split).model
    params = models.init(config, jax.random.key(0))
    reference.save(tmp_path / "model.npz", config, params)
    arrays = reference.read_arrays(tmp_path / "model.npz")
    np.testing.assert_array_equal(arrays["lm_head.weight"], arrays["model.embed_tokens.weight"])
    again, loaded = reference.load(tmp_path / "model.npz", "B", heads=4)
    assert not again.tie_embeddings
    tokens = np.arange(48).reshape(2, 24)
    found, expected = models.forward(again, loaded, tokens), models.forward(config, params, tokens)
    np.testing.assert_allclose(found, expected, atol=3e-5)


def test_another_ending_is_refused(tmp_path):
    config = small_config("ae_split").model
    params = models.init(config, jax.random.key(0))
    with pytest.raises(ValueError, match=r"--out must end in .pth or .npz .*model.bin"):
        reference.save(tmp_path / "model.bin", config, params)
