import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flowhn_jax import models
from flowhn_jax.config import BASELINES
from flowhn_jax.interop import huggingface
from flowhn_jax.interop.families import to_config
from flowhn_jax.models.base import Mamba1Keys
from tests import golden_files
from tests.small import small_baseline, small_config

FIXTURES = ["hf_llama_24", "hf_mamba_24", "hf_mamba2_24", "hf_jamba_24", "hf_falcon_h1_24"]
KNOWN = ("llama", "mamba1", "mamba2", "jamba", "falcon_h1")


def read(name):
    """Return a golden file's arrays, state dict and config.json."""
    arrays, state_dict = golden_files.read(name)
    return arrays, state_dict, json.loads(str(arrays["config"]))


def random_model(config, seed=0):
    """Return random parameters, also where the initial ones are constant."""
    params = models.init(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noise = [0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])


def tokens_for(config):
    return np.random.default_rng().integers(0, config.vocab_size, (2, 24))


@pytest.mark.parametrize("name", FIXTURES)
def test_parity_with_transformers(name):
    arrays, state_dict, hf_config = read(name)
    config, params = huggingface.from_state_dict(state_dict, hf_config)
    golden_files.assert_parity(config, params, arrays, to_config(hf_config)[0].names(config))


@pytest.mark.parametrize("kind", [*BASELINES, "fai_split", "no_split"])
def test_saving_and_loading_keeps_the_model(kind, tmp_path):
    """The config is the same, and the logits are so bit for bit."""
    config = small_baseline(kind) if kind in BASELINES else small_config(kind).model
    params = random_model(config)
    huggingface.save(tmp_path / "model", config, params)
    again, loaded = huggingface.load(tmp_path / "model")
    if kind in KNOWN:  # which have no key for the dtype
        again = dataclasses.replace(again, dtype=config.dtype)
    if isinstance(config, Mamba1Keys):  # a rank that follows from the width is written out
        assert again.dt_rank == config.dt_rank
        again = dataclasses.replace(again, ssm_dt_rank=config.ssm_dt_rank)
    assert again == config
    tokens = tokens_for(config)
    expected = models.forward(config, params, tokens)
    np.testing.assert_array_equal(models.forward(again, loaded, tokens), expected)


def test_shards_are_loaded(tmp_path):
    config = small_baseline("llama")
    params = random_model(config)
    huggingface.save(tmp_path, config, params)
    whole = load_file(tmp_path / "model.safetensors")
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(whole)}
    for part in sorted(set(weight_map.values())):
        save_file({n: whole[n] for n, p in weight_map.items() if p == part}, tmp_path / part)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    loaded = huggingface.load(tmp_path)[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    others = random_model(config, seed=1)
    huggingface.save(tmp_path, config, others)  # the old shards are ignored
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path)[1], others)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no part-1.safetensors"):
        huggingface.load(tmp_path)
    for outside in ("../part-0.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(ValueError, match=r"must name .safetensors files in its own folder"):
            huggingface.load(tmp_path)


def test_shards_of_pytorch_are_loaded(tmp_path):
    """Only if there are no safetensors; the index names files of the same form."""
    torch = pytest.importorskip("torch")
    config = small_baseline("llama")
    params = random_model(config)
    huggingface.save(tmp_path, config, params)
    whole = {name: torch.tensor(a) for name, a in load_file(tmp_path / "model.safetensors").items()}
    weight_map = {name: f"part-{i % 2}.bin" for i, name in enumerate(whole)}
    for part in ("part-0.bin", "part-1.bin"):
        torch.save({n: whole[n] for n, p in weight_map.items() if p == part}, tmp_path / part)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(whole, "model.safetensors")}))
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path)[1], params)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"must name .bin files in its own .*model.safetensors"):
        huggingface.load(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path)[1], params)
    torch.save(whole, tmp_path / "pytorch_model.bin")
    index.write_text("{}")  # one file is preferred
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path)[1], params)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"index.json' must have a weight_map"):
        huggingface.load(tmp_path)


def test_bfloat16_files_are_loaded(tmp_path):
    config = small_baseline("mamba1")
    params = random_model(config)
    huggingface.save(tmp_path, config, params)
    from safetensors.flax import save_file as save_jax

    arrays = load_file(tmp_path / "model.safetensors")
    halves = {name: jnp.asarray(array, jnp.bfloat16) for name, array in arrays.items()}
    save_jax(halves, tmp_path / "model.safetensors")
    _, loaded = huggingface.load(tmp_path)
    for leaf, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, expected.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_tied_head_stays_tied():
    """Also where the arrays hold it a second time, or as the head alone."""
    _, state_dict, hf_config = read("hf_mamba_24")
    head = state_dict.pop("lm_head.weight")
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
        huggingface.from_state_dict(state_dict, hf_config)
    tied = hf_config | {"tie_word_embeddings": True}
    del hf_config["tie_word_embeddings"]  # as in the released Mambas, whose heads are tied
    table = state_dict["backbone.embeddings.weight"]
    alone = {name: array for name, array in state_dict.items() if array is not table}
    for arrays, each in (
        (state_dict, tied),
        (state_dict, hf_config),
        (state_dict | {"lm_head.weight": table}, tied),
        (alone | {"lm_head.weight": table}, tied),
    ):
        config, params = huggingface.from_state_dict(arrays, each)
        assert config.tie_embeddings
        assert "head" not in params
        np.testing.assert_array_equal(params["embed"]["embedding"], table)
    config, params = huggingface.from_state_dict(state_dict | {"lm_head.weight": head}, tied)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["head"]["kernel"], head.T)


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in KNOWN[1:])]
)
def test_a_tied_model_goes_to_transformers_and_back(kind, tmp_path):
    """Equal logits and parameter counts, `tie_word_embeddings: true`, and no tensor of a head."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    config = small_baseline(kind, tie_embeddings=True)
    tokens = tokens_for(config)
    params = random_model(config)
    huggingface.save(tmp_path / "ours", config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.num_parameters() == models.param_count(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    again, loaded = huggingface.load(tmp_path / "theirs")
    assert again.tie_embeddings
    assert models.param_count(again) == theirs.num_parameters()
    logits = models.forward(again, loaded, tokens)
    np.testing.assert_allclose(logits, expected, atol=3e-5 * np.abs(expected).max(), rtol=0)
    huggingface.save(tmp_path / "back", again, loaded)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]
    names = set(load_file(tmp_path / "back" / "model.safetensors"))
    assert names == set(load_file(tmp_path / "theirs" / "model.safetensors"))
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(
    ("fixture", "changed", "message"),
    [
        ("hf_llama_24", {"attention_bias": None}, r"must be False or True, got None"),
        ("hf_jamba_24", {"attention_bias": True}, r"attention_bias must be False, got True"),
        ("hf_llama_24", {"hidden_act": "gelu"}, r"hidden_act must be 'silu', got 'gelu'"),
        (
            "hf_llama_24",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope"}},
            r"rope_type must be default, linear, dynamic, yarn or llama3; got 'longrope'",
        ),
        (
            "hf_llama_24",
            {"rope_scaling": {"type": "su", "factor": 2.0}},
            r"rope_type must be default, .* or llama3; got 'su'",
        ),
        (
            "hf_llama_24",
            {"rope_scaling": {"type": "llama3", "factor": 2.0}},
            "rope_scaling of type 'llama3' must have low_freq_factor",
        ),
        (
            "hf_llama_24",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": "x"}},
            "beta_fast must be a number; got 'x'",
        ),
        (
            "hf_llama_24",
            {"rope_scaling": {"type": "linear", "factor": -2.0}},
            r"rope_scaling.factor must be above 0; got -2.0",
        ),
        (
            "hf_llama_24",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor must be 1; got 0.5",
        ),
        ("hf_llama_24", {"model_type": "mistral", "sliding_window": 8}, "sliding_window must be"),
        ("hf_llama_24", {"sliding_window": 8}, r"sliding_window must be None, got 8"),
        ("hf_llama_24", {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            "hf_llama_24",
            {"model_type": "gpt2"},
            r"must be one of llama, mamba, mamba2, .*; got 'gpt2'",
        ),
        (
            "hf_mamba_24",
            {"use_conv_bias": False},
            r"unknown \['backbone.layers.0.mixer.conv1d.bias', .* \(0 and 2 in total\)",
        ),
        ("hf_mamba_24", {"use_bias": True}, r"missing \['backbone.layers.0.mixer.in_proj.bias'"),
        ("hf_mamba_24", {"time_step_limit": [0.0, 0.1]}, "time_step_limit must be .* got"),
        ("hf_mamba2_24", {"time_step_limit": [0.1]}, r"a list of two numbers; got \[0.1\]"),
        ("hf_mamba2_24", {"time_step_limit": ["a", 0.1]}, "time_step_limit must be a list of two"),
        ("hf_mamba2_24", {"num_heads": 5}, r"num_heads \* head_dim must be .* = 64; got 5 \* 16"),
        ("hf_mamba2_24", {"head_dim": None}, r"must be .* = 64; got 4 \* None"),
        (
            "hf_jamba_24",
            {"num_experts": 4},
            r"num_experts must be 1, got 4\. .* Jamba v0.1, .* as AI21-Jamba-Reasoning-3B, are",
        ),
        (
            "hf_falcon_h1_24",
            {"mamba_rms_norm": True},
            r"missing \['model.layers.0.mamba.norm.weight', .* \(2 and 0 in total\)",
        ),
        ("hf_falcon_h1_24", {"mlp_multipliers": [2.0]}, r"must have 2 values; got \[2.0\]"),
        ("hf_llama_24", {"is_causal": False}, r"is_causal must be True, got False"),
        ("hf_jamba_24", {"is_causal": None}, r"is_causal must be True, got None"),
        ("hf_llama_24", {"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config"),
        (
            "hf_llama_24",
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
            "one rope_theta for all layers; it has separate ones for 'full_attention'",
        ),
        ("hf_falcon_h1_24", {"mamba_d_head": 5}, r"must be .* / mamba_n_heads = \d+; got 5\."),
        (
            "hf_falcon_h1_24",
            {"mamba_d_head": "x"},
            "mamba_d_head must be mamba_d_ssm / .*; got 'x'",
        ),
        ("hf_llama_24", {"num_hidden_layers": 3}, r"missing \['model.layers.2.*9 and 0 in total"),
        (
            "hf_llama_24",
            {"model_type": ["llama"]},
            r"model_type must be one of .*; got \['llama'\]",
        ),
        (
            "hf_llama_24",
            {"num_attention_heads": 0},
            "num_attention_heads must be a size above 0; got 0",
        ),
        ("hf_llama_24", {"hidden_size": "32"}, "hidden_size must be a size above 0; got '32'"),
        (
            "hf_llama_24",
            {"hidden_size": float("nan")},
            "hidden_size must be a size above 0; got nan",
        ),
        ("hf_llama_24", {"rope_scaling": [1]}, r"rope_scaling must be an object; got \[1\]"),
        ("hf_falcon_h1_24", {"mlp_multipliers": 2.0}, "mlp_multipliers must be a list; got 2.0"),
        ("hf_llama_24", {"tie_word_embeddings": "no"}, "must be true or false; got 'no'"),
        (
            "hf_llama_24",
            {"intermediate_size": 40},
            r"gate_proj.weight must have shape \(32, 40\) .* from \(48, 32\)",
        ),
    ],
)
def test_unsupported_settings_are_refused_by_name(fixture, changed, message):
    _, state_dict, hf_config = read(fixture)
    with pytest.raises(ValueError, match=message):
        huggingface.from_state_dict(state_dict, hf_config | changed)


WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("keys", "is_refused"),
    [
        (WINDOW, False),  # the model has two layers
        (WINDOW | {"max_window_layers": 1}, True),
        (WINDOW | {"max_window_layers": 1, "sliding_window": None}, False),
        (WINDOW | {"max_window_layers": 1, "use_sliding_window": False}, False),
        (WINDOW | {"max_window_layers": 1, "layer_types": ["full_attention"] * 2}, False),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"use_sliding_window": True}, "must have 'max_window_layers'"),
        (WINDOW | {"max_window_layers": "1"}, "max_window_layers must be a number of layers"),
        (WINDOW | {"use_sliding_window": 1}, "use_sliding_window must be true or false; got 1"),
        ({"layer_types": "full_attention"}, "layer_types must be a list"),
    ],
)
def test_qwens_layers_with_a_window_are_refused(keys, is_refused):
    _, _, hf_config = read("hf_llama_24")
    for model_type in ("qwen2", "qwen3"):
        given = hf_config | {"model_type": model_type} | keys
        if not is_refused:
            assert to_config(given)[1].kind == "llama"
            continue
        message = is_refused if isinstance(is_refused, str) else "got 'sliding_attention'"
        with pytest.raises(ValueError, match=message):
            to_config(given)


def test_dynamic_scaling_needs_the_context():
    _, _, hf_config = read("hf_llama_24")
    del hf_config["max_position_embeddings"]
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2}}
    with pytest.raises(ValueError, match="type 'dynamic' must have max_position_embeddings"):
        to_config(hf_config | scaling)


def test_keys_whose_absence_means_another_size_must_be_there():
    _, _, hf_config = read("hf_llama_24")
    hf_config |= {"sliding_window": None}
    for model_type, key in (
        ("qwen3", "head_dim"),
        ("mistral", "num_key_value_heads"),
        ("mistral", "sliding_window"),
    ):
        given = {name: value for name, value in hf_config.items() if name != key}
        with pytest.raises(ValueError, match=f"config.json of {model_type} must have '{key}'"):
            to_config(given | {"model_type": model_type})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"factor": 2.0, "rope_type": "yarn", "beta_fast": 0}, (2.0, 128, None, 32.0)),
        ({"rope_type": "yarn", "original_max_position_embeddings": 32}, (4.0, 32, None, 32.0)),
        ({"factor": 2, "type": "dynamic"}, (2.0, 128, None, 32.0)),
        ({"factor": 2, "rope_type": "yarn", "attention_factor": 1.5}, (2.0, 128, 1.5, 32.0)),
    ],
)
def test_absent_keys_of_rotary_scaling_follow_from_others(given, expected):
    _, _, hf_config = read("hf_llama_24")
    for name in ("rope_scaling", "rope_parameters"):
        found = to_config(hf_config | {name: given})[1].rope_scaling
        keys = "factor", "original_context", "attention_factor", "beta_fast"
        assert tuple(getattr(found, key) for key in keys) == expected
    other = to_config(hf_config | {"rope_scaling": given, "original_max_position_embeddings": 64})
    if "yarn" in given.values():
        assert other[1].rope_scaling.original_context == 64


def test_frequencies_in_old_files_are_ignored():
    _, state_dict, hf_config = read("hf_llama_24")
    expected = huggingface.from_state_dict(state_dict, hf_config)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4) for i in range(2)}
    found = huggingface.from_state_dict(state_dict | old, hf_config)
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


@pytest.mark.parametrize(
    "keys", [{"qk_norm": True, "mlp_bias": True}, {"attention_bias": "qkv", "mlp_bias": True}]
)
def test_options_that_no_model_of_transformers_has_are_refused(keys, tmp_path):
    config = small_baseline("llama", **keys)
    with pytest.raises(ValueError, match=r"must be those of one of llama, mistral, qwen2, qwen3"):
        huggingface.save(tmp_path / "model", config, models.init(config, jax.random.key(0)))


def test_quantized_numbers_are_refused(tmp_path):
    """Without their scales they would be other weights."""
    _, state_dict, hf_config = read("hf_llama_24")
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (np.int8, np.uint8, np.complex64, bool):
        changed = state_dict | {name: state_dict[name].astype(dtype)}
        with pytest.raises(
            ValueError, match=rf"{name} must have a floating.* got {np.dtype(dtype)}, as"
        ):
            huggingface.from_state_dict(changed, hf_config)
    save_file(state_dict | {name: state_dict[name].astype(np.int8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    with pytest.raises(ValueError, match="must have a floating-point type; got int8"):
        huggingface.load(tmp_path)


def test_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json' is an adapter"):
        huggingface.load(tmp_path)


def test_unknown_tensors_are_refused():
    _, state_dict, hf_config = read("hf_llama_24")
    with pytest.raises(ValueError, match=r"unknown \['extra'\] \(0 and 1 in total\)"):
        huggingface.from_state_dict(state_dict | {"extra": np.zeros(2)}, hf_config)


@pytest.mark.parametrize(
    ("fixture", "epsilon"),
    [("hf_llama_24", "rms_norm_eps"), ("hf_mamba_24", "layer_norm_epsilon")],
)
def test_missing_keys_are_named(fixture, epsilon):
    _, state_dict, hf_config = read(fixture)
    for key in ("hidden_size", "vocab_size", "num_hidden_layers", epsilon):
        without = {name: value for name, value in hf_config.items() if name != key}
        with pytest.raises(ValueError, match=f"must have '{key}'"):
            huggingface.from_state_dict(state_dict, without)


def test_keys_of_older_versions_are_read():
    """Rotary positions as before transformers 5, or none; a time step limit in integers."""
    _, state_dict, hf_config = read("hf_llama_24")
    del hf_config["rope_parameters"]
    for keys, theta in (
        ({}, 1e4),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}, 5e5),
    ):
        config, _ = huggingface.from_state_dict(state_dict, hf_config | keys)
        assert config.rope_theta == theta
    _, state_dict, hf_config = read("hf_mamba2_24")
    huggingface.from_state_dict(state_dict, hf_config | {"time_step_limit": [0, "Infinity"]})


def test_sizes_that_transformers_does_not_support_are_refused(tmp_path):
    config = small_baseline("mamba1", ssm_expand=1.5)
    with pytest.raises(ValueError, match=r"model.ssm_expand must be an integer .*; got 1.5"):
        huggingface.save(tmp_path, config, models.init(config, jax.random.key(0)))


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a folder with config.json"):
        huggingface.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        huggingface.load(tmp_path)
    config = small_baseline("llama")
    huggingface.save(tmp_path, config, models.init(config, jax.random.key(0)))
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-10], whole[:5], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a complete safetensors file"):
            huggingface.load(tmp_path)
    weights.write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON: it is nested too deeply"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"must hold an object; got \[1\]"):
        huggingface.load(tmp_path)
    with pytest.raises(ValueError, match="must be saved to a folder"):
        huggingface.save(weights, config, models.init(config, jax.random.key(0)))


def test_saving_replaces_links_instead_of_writing_through_them(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("not yours")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "config.json.tmp", "model.safetensors.tmp"):
        (folder / name).symlink_to(precious)
    config = small_baseline("llama")
    huggingface.save(folder, config, models.init(config, jax.random.key(0)))
    assert precious.read_text() == "not yours"
    assert huggingface.load(folder)[0].width == config.width


@pytest.mark.parametrize("kind", KNOWN)
def test_transformers_loads_a_saved_model(kind, tmp_path):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    config = small_baseline(kind)
    params = random_model(config)
    huggingface.save(tmp_path, config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = tokens_for(config)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(models.forward(config, params, tokens), logits, atol=3e-5, rtol=1e-5)
