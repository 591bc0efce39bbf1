import json
import math
import pathlib
import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from flowhn_jax import models
from flowhn_jax.config import MeshConfig
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation import scoring
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
    """Return the score in float64, from the full logits of the pair alone."""
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
    """Short and long pairs, a truncated one, and one with only the first token as its context."""
    pairs = pairs_of(rng, [(3, 2), (0, 1), (19, 4), (30, 5), (2, 40), (7, 7), (15, 1)])
    likeliest = expected_likeliest(*model, pairs[0])
    pairs.append(Pair(pairs[0].context, likeliest))
    counts = []
    scores = scorer_on(model, devices).score(pairs, counts.append)
    assert sum(counts) == len(pairs)
    for pair, score in zip(pairs, scores, strict=True):
        total, greedy = expected_score(*model, pair)
        assert score.log_likelihood == pytest.approx(total, abs=1e-4)
        assert score.is_greedy == greedy
        assert score.is_truncated == (sum(map(len, pair)) > 25)
    assert scores[-1].is_greedy


def expected_likeliest(config, params, pair):
    padded = np.zeros(config.context, int)
    padded[: len(pair.context)] = pair.context
    logits = models.forward(config, params, padded[None])[0, len(pair.context) - 1]
    return [int(np.argmax(logits))]


@pytest.fixture
def bigrams(monkeypatch):
    """Use a table of logits [V, V], with a different row after each token, as the model."""

    def bind(config, params):
        def model(tokens):
            return jax.nn.one_hot(tokens, params.shape[0], dtype=jnp.bfloat16)

        model.head_kernel = lambda: params
        return model

    fake = types.SimpleNamespace(bind=bind, for_inference=lambda config, params: params)
    monkeypatch.setattr(scoring, "models", fake)
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(11), (11, 1)), axis=1)
    return rows.astype(np.float32) / 4  # exact in bfloat16, but not their log-probabilities


def bigram_score(table, pair, context):
    ids = (pair.context + pair.continuation)[-context - 1 :]
    scored = range(max(1, len(ids) - len(pair.continuation)), len(ids))
    rows = {i: table[ids[i - 1]].astype(np.float64) for i in scored}
    total = sum(rows[i][ids[i]] - np.log(np.exp(rows[i]).sum()) for i in scored)
    return total, all(rows[i].argmax() == ids[i] for i in scored)


@pytest.mark.parametrize("context", [None, 20])
def test_scores_by_a_table_of_bigrams(bigrams, monkeypatch, context):
    """Longest first, in batches; the last batch is not full."""
    config = small_config().model
    most = config.context if context is None else context
    scorer = Scorer(config, bigrams, make_mesh(MeshConfig(data=1), 2), 2, context)
    ids = np.random.default_rng(1).integers(0, 11, 99).tolist()
    lengths = [(3, 2), (1, 1), (most - 1, 2), (most, 2), (4, most + 3), (1, most), (9, 9)]
    pairs = [Pair(ids[:before], ids[before : before + after]) for before, after in lengths]
    greedy = [int(bigrams[3].argmax())]
    greedy.append(int(bigrams[greedy[0]].argmax()))
    pairs += [Pair([3], greedy), Pair([5, 3], [greedy[0], (greedy[1] + 1) % 11])]
    shapes, counts = [], []
    score = scoring._score

    def recorded(config, params, tokens, scored):
        shapes.append((tokens.shape, scored.shape))
        return score(config, params, tokens, scored)

    monkeypatch.setattr(scoring, "_score", recorded)
    found = scorer.score(pairs, counts.append)
    assert found == scorer.score(pairs)
    for pair, each in zip(pairs, found, strict=True):
        total, is_greedy = bigram_score(bigrams, pair, most)
        assert each.log_likelihood == pytest.approx(total, abs=1e-5)
        assert each.is_greedy == is_greedy
        assert each.is_truncated == (len(pair.context) + len(pair.continuation) > most + 1)
    assert [each.is_greedy for each in found[-2:]] == [True, False]
    columns = [most, most, most, 16, 16]  # 17 needed in the third
    assert shapes[:5] == [((2, width + 1), (2, width)) for width in columns]
    assert counts == [2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("most", "batch", "length", "vocabulary", "chunk"),
    [
        (None, 8, 1024, 65536, 64),  # 128 MiB by default
        (1, 2, 16, 11, 1),
        (7 * 22, 2, 16, 11, 4),
        (8 * 22, 2, 16, 11, 8),
        (99 * 22, 2, 24, 11, 8),
        (5, 2, 24, 11, 1),
    ],
)
def test_logits_of_a_few_positions_at_a_time(
    bigrams, monkeypatch, most, batch, length, vocabulary, chunk
):
    """As many as the largest power of two that fits into `_MAX_LOGITS` and divides T."""
    if most is not None:
        monkeypatch.setattr(scoring, "_MAX_LOGITS", most)
    jaxpr = jax.make_jaxpr(partial(scoring._score.__wrapped__, None))(
        jax.ShapeDtypeStruct((4, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((batch, length + 1), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), bool),
    )
    shapes = {tuple(map(int, s)) for s in re.findall(r"f32\[(\d+),(\d+),(\d+)\]", str(jaxpr))}
    assert {each for each in shapes if each[2] == vocabulary} == {(batch, chunk, vocabulary)}


def test_scores_are_summed_over_the_chunks(bigrams, monkeypatch):
    monkeypatch.setattr(scoring, "_MAX_LOGITS", 8 * 22)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 11, (2, 25))
    for position in range(24):
        tokens[1, position + 1] = bigrams[tokens[1, position]].argmax()
    scored = rng.random((2, 24)) < 0.5
    totals, greedy = jax.jit(partial(scoring._score.__wrapped__, None))(bigrams, tokens, scored)
    log_p = np.asarray(jax.nn.log_softmax(bigrams[tokens[:, :-1]]))
    of_targets = np.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(totals, (of_targets * scored).sum(1), rtol=1e-5)
    assert greedy.tolist() == [False, True]


@given(context=st.text("ab \n", max_size=6), continuation=st.text("ab ", max_size=6))
@settings(max_examples=60)
def test_the_ids_of_a_pair_are_the_bytes_of_its_text(context, continuation):
    whole = list((context + continuation).encode())
    if len(whole) == len(context.rstrip()):
        with pytest.raises(ValueError, match="must add a token to the context"):
            encode_pair(BYTES, context, continuation)
        return
    pair = encode_pair(BYTES, context, continuation)
    assert pair.context == [256, *context.rstrip().encode()]
    assert pair.context[1:] + pair.continuation == whole


def test_spaces_belong_to_the_following_token(tmp_path):
    """As in training, where a space before a word is never a separate token."""
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
    assert standard_error([1.0, 4.0]) == pytest.approx(1.5)
    assert standard_error([1.0]) == 0.0


def test_the_harness_gives_the_same_scores(model):
    """EleutherAI's classes agree with ours to 1e-4 nats on items of four tasks."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    from flowhn_jax.evaluation.generate import generate
    from flowhn_jax.evaluation.harness import HarnessLM
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
