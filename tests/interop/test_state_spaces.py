import json
import pickle
import sys

import jax
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.interop import huggingface, state_spaces
from tools.published import save_original

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MAMBA = {  # as in state-spaces/mamba-130m
    "d_model": 16,
    "n_layer": 2,
    "vocab_size": 61,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
MAMBA2 = {  # as in state-spaces/mamba2-130m
    **{"d_model": 32, "d_intermediate": 0, "n_layer": 2, "vocab_size": 61},
    **{"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True},
    **{"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16},
    "tie_embeddings": True,
}
CASES = {
    "mamba": (MAMBA, {"state_size": 16, "time_step_rank": 1}),
    "mamba_options": (
        MAMBA
        | {"tie_embeddings": False, "pad_vocab_size_multiple": 1}
        | {"ssm_cfg": {"d_state": 4, "d_conv": 3, "expand": 3, "dt_rank": 2, "conv_bias": False}},
        {"state_size": 4, "conv_kernel": 3, "expand": 3, "time_step_rank": 2, "vocab_size": 61}
        | {"use_conv_bias": False, "tie_word_embeddings": False},
    ),
    "mamba2": (
        MAMBA2,
        {"state_size": 128, "head_dim": 64, "num_heads": 1, "n_groups": 1}
        | {"tie_word_embeddings": True},
    ),
    "mamba2_options": (
        MAMBA2
        | {"ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2, "bias": True}},
        {"state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 2, "use_bias": True}
        | {"tie_word_embeddings": True},
    ),
}


def random_model(original, keys):
    """Return transformers' model of an original config, all of its parameters random."""
    kind = "mamba2" if original["ssm_cfg"].get("layer") == "Mamba2" else "mamba"
    sizes = {"hidden_size": original["d_model"], "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.AutoConfig.for_model(kind, **sizes | keys)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def save(folder, original, model, **options):
    """Save a model of transformers as Mamba's authors do."""
    save_original(model, folder, **options)
    (folder / "config.json").write_text(json.dumps(original))


@pytest.mark.parametrize("name", CASES)
def test_parity_with_transformers(name, tmp_path, rng):
    original, keys = CASES[name]
    model = random_model(original, keys)
    save(tmp_path, original, model)
    config, params = huggingface.load(tmp_path)
    tokens = rng.integers(0, 61, (2, 12))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    found = models.forward(config, params, tokens)
    assert np.abs(found - expected).max() < 3e-5 * np.abs(expected).max()

    huggingface.save(tmp_path / "export", config, params)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        np.testing.assert_array_equal(exported(torch.tensor(tokens)).logits.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_zip", [True, False])
def test_formats_of_torch_are_read(dtype, is_zip, tmp_path):
    model = random_model(*CASES["mamba"]).to(dtype)
    save(tmp_path, MAMBA, model, _use_new_zipfile_serialization=is_zip)
    _, params = huggingface.load(tmp_path)
    embedding = params["embed"]["embedding"]
    assert embedding.dtype == np.float32
    expected = model.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(embedding, expected)


def test_safetensors_come_first(tmp_path):
    """A pickle next to them is not read; parameters that were read from it outlive it."""
    model = random_model(*CASES["mamba"])
    save(tmp_path, MAMBA, model)
    config, params = huggingface.load(tmp_path)
    huggingface.save(tmp_path, config, params)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    _, again = huggingface.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, params)


class _Attack:
    def __reduce__(self):
        return print, ("this code must not run",)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", pickle.dumps({"a": _Attack()}, protocol=2)],
    ids=["empty", "truncated", "with code"],
)
def test_unsafe_and_damaged_files_are_refused(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MAMBA))
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model.bin' must be a state dict that can be"):
        huggingface.load(tmp_path)
    assert "must not run" not in capsys.readouterr().out


def test_other_tensors_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MAMBA))
    for content, message in (
        ({"a": torch.zeros(2), "step": 3}, "must hold a state dict: a dict of names and tensors"),
        ({"a": torch.eye(2).to_sparse()}, "must hold dense tensors of bfloat16 or a type"),
    ):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            huggingface.load(tmp_path)


def test_a_missing_torch_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(MAMBA))
    (tmp_path / "pytorch_model.bin").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"model.bin' needs PyTorch: pip install torch\.$"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    ("original", "changed", "message"),
    [
        (
            MAMBA2,
            {"attn_layer_idx": [1]},
            r"attn_layer_idx must be \[\], as hybrids with attention .* got \[1\]",
        ),
        (MAMBA2, {"d_intermediate": 64}, "d_intermediate must be 0, as MLPs .* got 64"),
        (MAMBA, {"rms_norm": False}, "rms_norm must be True, as layer norms .* got False"),
        (MAMBA, {"ssm_cfg": [1]}, r"ssm_cfg must be an object; got \[1\]"),
        (MAMBA, {"ssm_cfg": {"layer": "Mamba3"}}, "layer of ssm_cfg must be Mamba1 or Mamba2; got"),
        (MAMBA, {"ssm_cfg": {"layer": [1]}}, r"must be Mamba1 or Mamba2; got \[1\]"),
        (MAMBA, {"ssm_cfg": {"headdim": 8}}, "arguments of Mamba1 .* got 'headdim': 8"),
        (
            MAMBA2,
            {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}},
            "norm_before_gate must be False, in ssm_cfg, as others are not supported; got True",
        ),
        (
            MAMBA2,
            {"ssm_cfg": {"layer": "Mamba2", "headdim": 0}},
            "headdim must be an integer above 0; got 0",
        ),
        (MAMBA, {"d_model": "16"}, "d_model must be an integer above 0; got '16'"),
        (MAMBA, {"n_layer": None}, "n_layer must be an integer above 0; got None"),
        (MAMBA, {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple must be an integer above"),
        (MAMBA, {"tie_embeddings": 1}, "tie_embeddings must be true or false; got 1"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(original, changed, message):
    with pytest.raises(ValueError, match=message):
        huggingface.from_state_dict({}, original | changed)


def test_arguments_without_effect_are_ignored():
    training = {"dt_min": 0.01, "dt_init": "random", "chunk_size": 64, "use_fast_path": False}
    changed = MAMBA | {"ssm_cfg": training}
    assert state_spaces.to_hf_config(changed) == state_spaces.to_hf_config(MAMBA)


def test_a_tied_head_may_be_absent(tmp_path):
    model = random_model(*CASES["mamba"])
    save(tmp_path, MAMBA, model)
    arrays = torch.load(tmp_path / "pytorch_model.bin")
    _, expected = huggingface.from_state_dict(arrays, MAMBA)
    del arrays["lm_head.weight"]
    _, found = huggingface.from_state_dict(arrays, MAMBA)
    np.testing.assert_array_equal(found["embed"]["embedding"], expected["embed"]["embedding"])
