"""The PyTorch code of exported FlowHN, SHM and Hymba models, next to ours."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from flowhn_jax import models
from flowhn_jax.config import FlowHNConfig
from flowhn_jax.interop import huggingface
from tests.interop.test_huggingface import random_model
from tests.small import small_baseline, small_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONTEXT = 24
CONFIGS = {
    **{
        strategy: small_config(strategy, model={"blocks": 3})
        for strategy in ("no_split", "ae_split", "fa_split", "fac_split", "fai_split")
    },
    "mamba2": small_config(
        "fai_split",
        model={"blocks": 3, "ssm": "mamba2", "ssm_head_dim": 8, "ssm_groups": 2},
        split={"stem": 1},
    ),
    "residual": small_config("no_split", model={"fusion": "residual"}),
    "options": small_config(
        "fai_split",
        model={
            "blocks": 3,
            "fusion": "residual",
            "attention_rope_theta": 100.0,
            "attention_mlp_width": 40,
        },
        split={"stem": 1, "stem_kind": "ssm"},
    ),
    "reads_all": small_config(
        "fac_split", model={"attention_rope_theta": 50.0}, split={"reads": "all"}
    ),
    "attention_stem": small_config("fac_split", split={"stem": 1, "stem_kind": "attention"}),
    "learned_split": small_config(
        "learned_split",
        model={"blocks": 3, "fusion": "residual", "attention_rope_theta": 100.0},
        split={"stem": 1, "stem_kind": "ssm"},
    ),
    "learned_split_paper": small_config("learned_split"),
    "no_mlp": small_config("fac_split", model={"branch_mlp": False, "head_dim": 6}),
}
CONFIGS = {name: config.model for name, config in CONFIGS.items()}
CONFIGS["tied"] = dataclasses.replace(CONFIGS["fai_split"], tie_embeddings=True)
CONFIGS |= {"shm": small_baseline("shm"), "hymba": small_baseline("hymba")}


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory):
    """Keep the code that transformers copies out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


def load(config, params, folder):
    huggingface.save(folder, config, params)
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, trust_remote_code=True).eval()


_SLOW = ("residual", "attention_stem", "learned_split_paper")
_PARAMS = [
    pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in CONFIGS
]


@pytest.fixture(scope="module", params=_PARAMS)
def pair(request, tmp_path_factory):
    """Return a config, random parameters, and the model that transformers loads from the export."""
    config = CONFIGS[request.param]
    params = random_model(config, seed=list(CONFIGS).index(request.param))
    return config, params, load(config, params, tmp_path_factory.mktemp("model"))


def tokens_of(config, rows=2, length=CONTEXT):
    """Return random ids; 0 is left out, which serves as padding."""
    return np.random.default_rng().integers(1, config.vocab_size, (rows, length))


def logits_of(model, tokens, **options):
    with torch.no_grad():
        return model(torch.tensor(tokens), **options).logits.numpy()


def test_logits_are_ours(pair):
    config, params, theirs = pair
    for length in (CONTEXT, 13, 1):
        tokens = tokens_of(config, length=length)
        ours = np.asarray(models.forward(config, params, tokens))
        error = np.abs(ours - logits_of(theirs, tokens)).max()
        assert error < 3e-5 * np.abs(ours).max()


def test_greedy_text_is_ours_with_and_without_a_cache(pair):
    config, params, theirs = pair
    prompt = tokens_of(config, rows=1, length=5)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    texts = [
        theirs.generate(torch.tensor(prompt), use_cache=use_cache, **options)[0, 5:].tolist()
        for use_cache in (True, False)
    ]
    ours = prompt[0].tolist()
    for _ in range(12):
        padded = np.array([ours + [1] * (CONTEXT - len(ours))])
        logits = np.asarray(models.forward(config, params, padded))
        ours.append(int(logits[0, len(ours) - 1].argmax()))
    assert texts == [ours[5:], ours[5:]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token(pair, side):
    config, _, theirs = pair
    tokens = tokens_of(config, rows=1, length=9)
    longer = tokens_of(config, rows=1, length=13)
    padding = np.zeros((1, 4), int)
    parts = (padding, tokens) if side == "left" else (tokens, padding)
    batch = np.concatenate((np.concatenate(parts, 1), longer))
    mask = torch.tensor((batch != 0).astype(int))
    found = logits_of(theirs, batch, attention_mask=mask)
    own = found[:1, 4:] if side == "left" else found[:1, :9]
    scale = np.abs(own).max()
    assert np.abs(own - logits_of(theirs, tokens)).max() < 1e-5 * scale
    assert np.abs(found[1:] - logits_of(theirs, longer)).max() < 1e-5 * scale


def test_a_cache_continues_rows_of_different_lengths(pair):
    """Steps of one token and of several give the logits of the whole, padding or not."""
    config, _, theirs = pair
    tokens = tokens_of(config, length=20)
    mask = np.ones_like(tokens)
    tokens[0, :6] = mask[0, :6] = 0
    mask = torch.tensor(mask)
    whole = logits_of(theirs, tokens, attention_mask=mask)
    cache, pieces, start = None, [], 0
    for columns in (9, 1, 1, 4, 5):
        stop = start + columns
        with torch.no_grad():
            found = theirs(
                torch.tensor(tokens[:, start:stop]),
                attention_mask=mask[:, :stop],
                cache=cache,
                use_cache=True,
            )
        name = "cache" if "cache" in found else "past_key_values"  # by the version
        cache, start = found[name], stop
        pieces.append(found.logits.numpy())
    kept = mask.numpy().astype(bool)
    error = np.abs(np.concatenate(pieces, 1) - whole)[kept].max()
    assert error < 1e-5 * np.abs(whole).max()


def test_beams_are_the_same_with_and_without_a_cache(pair):
    config, _, theirs = pair
    prompt = torch.tensor(tokens_of(config, length=6))
    options = dict(max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
    cached, plain = (theirs.generate(prompt, use_cache=u, **options) for u in (True, False))
    assert cached.tolist() == plain.tolist()


def test_the_loss_and_its_gradients_exist(pair):
    config, _, theirs = pair
    tokens = torch.tensor(tokens_of(config))
    found = theirs(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(
        found.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in theirs.parameters())
    theirs.zero_grad()


def test_a_model_saved_by_transformers_is_imported(pair, tmp_path):
    config, params, theirs = pair
    theirs.save_pretrained(tmp_path)
    again, loaded = huggingface.load(tmp_path)
    assert again == config
    tokens = tokens_of(config)
    expected = models.forward(config, params, tokens)
    np.testing.assert_array_equal(models.forward(again, loaded, tokens), expected)


def test_a_tied_head_is_not_saved(tmp_path):
    config = CONFIGS["tied"]
    theirs = load(config, random_model(config), tmp_path / "ours")
    assert theirs.config.tie_word_embeddings
    assert theirs.num_parameters() == models.param_count(config)
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        assert "head.weight" not in load_file(tmp_path / name / "model.safetensors")


def test_a_row_beyond_the_plan_is_refused(tmp_path):
    config = CONFIGS["fac_split"]
    theirs = load(config, random_model(config), tmp_path)
    with pytest.raises(ValueError, match=r"at most the 24 tokens .* got 25"):
        logits_of(theirs, tokens_of(config, length=CONTEXT + 1))


def test_a_model_that_cannot_decode_has_no_code(tmp_path):
    config = CONFIGS["fac_split"]
    assert isinstance(config, FlowHNConfig)
    split = dataclasses.replace(config.split, scope="sequence")
    config = dataclasses.replace(config, split=split)
    params = random_model(config)
    huggingface.save(tmp_path, config, params)
    assert not (tmp_path / "modeling_flowhn.py").exists()
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    assert huggingface.load(tmp_path)[0] == config
