"""Flags of Falcon-H1, Mamba, Mamba-2 and Jamba that no published checkpoint combines like this."""

import json

import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.interop import huggingface
from flowhn_jax.interop.families import to_config
from flowhn_jax.models.mamba import Mamba1Config
from tests.small import small_baseline
from tools import published

FALCON_H1 = {
    "model_type": "falcon_h1",
    **{"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5},
    **{"mamba_d_ssm": 40, "mamba_n_heads": 10, "mamba_d_head": 4, "mamba_n_groups": 2},
    **{"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_rms_norm": True},
    **{"embedding_multiplier": 5.0, "lm_head_multiplier": 0.5, "mlp_multipliers": [0.9, 0.6]},
    **{"key_multiplier": 0.4, "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.8},
    **{"ssm_multipliers": [0.4, 0.3, 1.5, 0.5, 2.0], "ssm_in_multiplier": 1.25},
    **{"ssm_out_multiplier": 0.7, "max_position_embeddings": 64},
}
BIASES = {"mamba_proj_bias": True, "projectors_bias": True, "mamba_conv_bias": False}
MAMBA = {"vocab_size": 64, "hidden_size": 24, "state_size": 4, "num_hidden_layers": 2}
MAMBA |= {"use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-5}
MAMBA |= {"expand": 2, "conv_kernel": 4, "time_step_rank": 2}
CASES = {
    "falcon_h1_before_gate": FALCON_H1
    | BIASES
    | {"mamba_norm_before_gate": True, "attention_bias": True, "mlp_bias": True},
    "falcon_h1_after_gate": FALCON_H1 | {"mamba_norm_before_gate": False, "projectors_bias": True},
    "falcon_h1_without_norm": FALCON_H1 | {"mamba_rms_norm": False, "mamba_proj_bias": True},
    "falcon_mamba": MAMBA | {"model_type": "falcon_mamba", "mixer_rms_eps": 1e-2},
    "mamba": MAMBA | {"model_type": "mamba", "tie_word_embeddings": False},
    "mamba2": MAMBA | {"model_type": "mamba2", "n_groups": 3, "num_heads": 6, "head_dim": 8},
    "jamba": {
        "model_type": "jamba",
        **{"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-6},
        **{"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 1},
        **{"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 3},
        **{"mamba_proj_bias": True, "mamba_conv_bias": False},
    },
}


@pytest.mark.parametrize(
    "name",
    [
        name if name == "falcon_h1_before_gate" else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_parity_with_transformers(name, tmp_path):
    """Logits, greedy text with caches, the export, and a train step."""
    pytest.importorskip("transformers")
    found = published.compare(CASES[name], tmp_path)
    assert max(found.error, found.exported_error) <= published.TOLERANCE, found
    assert found.same_text, found
    assert found.trains, found


@pytest.mark.parametrize("name", ["falcon_h1_after_gate", "mamba2"])
def test_limits_of_time_steps(name, tmp_path, rng):
    """Whole sequences, as transformers leaves the limits out when it decodes with a cache."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    limited = CASES[name] | {"time_step_limit": [0.4, 0.8]}
    theirs = published.save_random(limited, tmp_path / "theirs")
    config, params = huggingface.load(tmp_path / "theirs")
    tokens = rng.integers(0, 64, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = models.forward(config, params, tokens)
    assert np.abs(found - expected).max() < 3e-5 * np.abs(expected).max()
    logits, cache = models.prefill(config, params, tokens[:, :6], length=12)
    for position in range(6, 12):
        assert np.abs(logits - expected[:, position - 1]).max() < 3e-5 * np.abs(expected).max()
        logits, cache = models.step(config, params, tokens[:, position], cache)
    huggingface.save(tmp_path / "export", config, params)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        np.testing.assert_array_equal(exported(torch.tensor(tokens)).logits.numpy(), expected)
    unlimited = to_config(CASES[name])[1]
    assert np.abs(models.forward(unlimited, params, tokens) - expected).max() > 1e-3


def test_falcon_mambas_inner_size_is_not_its_expansion():
    """The 7B has hidden_size 4096, intermediate_size 8192, and expand 16."""
    hf_config = json.loads((published.FOLDER / "falcon-mamba-7b.json").read_text())["config"]
    assert hf_config["expand"] == 16
    config = to_config(hf_config)[1]
    assert isinstance(config, Mamba1Config)
    assert config.inner == hf_config["intermediate_size"] == 2 * hf_config["hidden_size"]


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "jamba"])
def test_biases_that_transformers_has_not_are_refused(kind, tmp_path):
    config = small_baseline(kind, ssm_out_bias=True)
    with pytest.raises(ValueError, match=r"ssm_out_bias must be .* \(False\) for .*; got True"):
        huggingface.save(tmp_path, config, {})


# As published, in small sizes.
REFUSED = {
    "jamba-v0.1": (
        CASES["jamba"] | {"num_experts": 16, "num_experts_per_tok": 2},
        r"num_experts must be 1, got 16\. Mixtures of experts, such as Jamba v0\.1",
    ),
    "zamba-7b-v1": ({"model_type": "zamba", "hidden_size": 32}, "model_type must be .*got 'zamba'"),
    "zamba2-1.2b": ({"model_type": "zamba2", "hidden_size": 32}, "model_type must be .*'zamba2'"),
    "bamba-9b": ({"model_type": "bamba", "hidden_size": 32}, "model_type must be one of .*'bamba'"),
    "nemotron-h-8b": ({"model_type": "nemotron_h"}, "model_type must be one of .*'nemotron_h'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_hybrids_are_refused_by_name(name):
    hf_config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        to_config(hf_config)
