import json
import math
import pathlib

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from flowhn_jax import models
from flowhn_jax.config import MeshConfig
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation.scoring import Pair, Scorer, encode_pair, standard_error
from flowhn_jax.parallel.mesh import make_mesh
from tests.small import small_config

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model():
    config = small_config("fac_split").model
    return config, models.init(config, jax.random.key(np.random.default_rng().integers(2**31)))


def scorer_on(model, devices=1, batch_size=4):
    return Scorer(*model, make_mesh(MeshConfig(data=devices), batch_size), batch_size)


def expected_score(config, params, pair):
    """In float64, from the full logits of the pair alone."""
    ids = (pair.context + pair.continuation)[-config.context - 1 :]
    padded = np.zeros(config.context, int)
    padded[: len(ids) - 1] = ids[:-1]
    logits = np.asarray(models.forward(config, params, padded[None])[0], np.float64)
    total, greedy = 0.0, True
    for position in range(max(0, len(ids) - 1 - len(pair.continuation)), len(ids) - 1):
        row, target = logits[position], ids[position + 1]
        total += row[target] - row.max() - math.log(np.exp(row - row.max()).sum())
        greedy &= row.argmax() == target
    return total, greedy


def pairs_of(rng, lengths):
    return [
        Pair([256, *rng.integers(0, 256, before).tolist()], rng.integers(0, 256, after).tolist())
        for before, after in lengths
    ]


@pytest.mark.parametrize("devices", [1, 4])
def test_scores_are_those_of_full_logits(model, rng, devices):
    """Of short and long pairs, of one that is cut, and of one that is nothing but continuation."""
    pairs = pairs_of(rng, [(3, 2), (0, 1), (19, 4), (30, 5), (2, 40), (7, 7), (15, 1)])
    likeliest = expected_likeliest(*model, pairs[0])
    pairs.append(Pair(pairs[0].context, likeliest))
    told = []
    scores = scorer_on(model, devices).score(pairs, told.append)
    assert sum(told) == len(pairs)
    for pair, score in zip(pairs, scores, strict=True):
        total, greedy = expected_score(*model, pair)
        assert score.log_likelihood == pytest.approx(total, abs=1e-4)
        assert score.is_greedy == greedy
        assert score.is_cut == (sum(map(len, pair)) > 25)
    assert scores[-1].is_greedy


def expected_likeliest(config, params, pair):
    padded = np.zeros(config.context, int)
    padded[: len(pair.context)] = pair.context
    logits = models.forward(config, params, padded[None])[0, len(pair.context) - 1]
    return [int(np.argmax(logits))]


@given(context=st.text("ab \n", max_size=6), continuation=st.text("ab ", max_size=6))
@settings(max_examples=60)
def test_pairs_of_bytes_are_the_text(context, continuation):
    whole = list((context + continuation).encode())
    if len(whole) == len(context.rstrip()):
        with pytest.raises(ValueError, match="no token of its own"):
            encode_pair(BYTES, context, continuation)
        return
    pair = encode_pair(BYTES, context, continuation)
    assert pair.context == [256, *context.rstrip().encode()]
    assert pair.context[1:] + pair.continuation == whole


def test_spaces_belong_to_the_token_behind_them(tmp_path):
    """As texts are tokenized whole, in training: never ' ' alone before a word."""
    vocabulary = {"<eos>": 0, "a": 1, "b": 2, "Ġ": 3, "Ġb": 4}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("Ġ", "b")]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    for context, continuation in (("a", " b"), ("a ", "b")):
        assert encode_pair(tokenizer, context, continuation) == Pair([0, 1], [4])


def test_standard_error_is_scipys_formula():
    values = [0.0, 1.0, 1.0, 1.0, 0.0]
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert standard_error([1.0]) == 0.0


def test_the_harness_gives_the_same(model):
    """EleutherAI's classes, on items of four tasks: log-likelihoods of native tasks to 1e-4."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    from functools import partial

    from flowhn_jax.evaluation.generate import generate
    from flowhn_jax.evaluation.harness import HarnessLM
    from flowhn_jax.evaluation.sampling import Sampling
    from flowhn_jax.evaluation.task_formats import FORMATS

    folder = pathlib.Path(__file__).parent.parent / "data" / "tasks"
    texts = []
    for task in ("boolq", "lambada", "piqa", "winogrande"):
        for line in (folder / f"{task}.jsonl").read_text().splitlines():
            texts += FORMATS[task](json.loads(line)).pairs
    scorer = scorer_on(model)
    lm = HarnessLM(scorer, BYTES, partial(generate, *model, tokenizer=BYTES))
    native = scorer.score([encode_pair(BYTES, *pair) for pair in texts])
    kwargs = {"request_type": "loglikelihood", "doc": {}, "idx": 0}
    found = lm.loglikelihood([instance(arguments=pair, **kwargs) for pair in texts])
    for (log_likelihood, greedy), score in zip(found, native, strict=True):
        assert log_likelihood == pytest.approx(score.log_likelihood, abs=1e-4)
        assert greedy == score.is_greedy
    text = "The quick brown fox jumps over the lazy dog, twice."
    rolling = instance(arguments=(text,), **kwargs | {"request_type": "loglikelihood_rolling"})
    (total,) = lm.loglikelihood_rolling([rolling])
    ids = [256, *text.encode()]
    windows = [Pair(ids[s : s + 1], ids[s + 1 : s + 25]) for s in range(0, len(ids) - 1, 24)]
    assert total == pytest.approx(sum(expected_score(*model, w)[0] for w in windows), abs=1e-3)
    settings = {"until": ["q"], "max_gen_toks": 4}
    request = instance(arguments=("ab", settings), **kwargs | {"request_type": "generate_until"})
    (generated,) = lm.generate_until([request])
    greedy = generate(
        *model, ["ab"], max_new_tokens=4, stop=["q"], sampling=Sampling(temperature=0)
    )
    assert generated == greedy[0].text
