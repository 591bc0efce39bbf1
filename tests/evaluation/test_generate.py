import itertools

import jax
import numpy as np
import pytest

import flowhn_jax
from flowhn_jax import models
from flowhn_jax.config import BASELINES
from flowhn_jax.data.tokenizer import ByteTokenizer
from flowhn_jax.evaluation import generate as generation
from flowhn_jax.evaluation.generate import Clock, bucket, generate
from flowhn_jax.evaluation.sampling import Sampling
from flowhn_jax.evaluation.text_stream import TextStream
from flowhn_jax.split import STRATEGIES
from tests.slow import all_but
from tests.small import small_baseline, small_config

GREEDY = Sampling(temperature=0)


def model_of(name, context=24, **keys):
    keys = {"vocab_size": 300, "context": context} | keys
    if name in BASELINES:
        return small_baseline(name, **keys)
    return small_config(name, model=keys).model


def params_of(config):
    return models.init(config, jax.random.key(np.random.default_rng().integers(2**31)))


def likeliest(config, params, window):
    """Return the likeliest next token, of those that the tokenizer knows, after a window."""
    padded = np.pad(window, (0, config.context - len(window)))  # one length: compiled once
    logits = models.forward(config, params, padded[None])[0, len(window) - 1]
    return int(np.argmax(logits[:257]))


def recomputed(config, params, prompt, count):
    """Return greedy tokens, each from a separate forward pass."""
    window = [256, *prompt.encode()]
    for _ in range(count):
        window.append(likeliest(config, params, window))
        if window[-1] == 256:
            break
    return window[1 + len(prompt.encode()) :]


@pytest.mark.parametrize(
    "name",
    all_but(
        ["fac_split", "fai_split", "mamba2", "hymba"], [*STRATEGIES, "llama", "mamba2", "hymba"]
    ),
)
def test_greedy_text_equals_that_of_full_forward_passes(name):
    config = model_of(name)
    params = params_of(config)
    prompts = ["ab", "the quick", "c"]
    found = generate(config, params, prompts, max_new_tokens=8, sampling=GREEDY)
    for prompt, each in zip(prompts, found, strict=True):
        ids = recomputed(config, params, prompt, 8)
        text = bytes(i for i in ids if i < 256).decode(errors="replace")
        assert (each.prompt, each.text, each.tokens) == (prompt, text, len(ids))
        assert each.finish == ("end_of_text" if ids[-1] == 256 else "length")


def test_the_same_seed_gives_the_same_text_for_any_batch_size():
    config = model_of("fac_split")
    params = params_of(config)
    prompts = ["one", "two two", "three", "four 4"]
    options = dict(max_new_tokens=9, sampling=Sampling(temperature=0.9, top_p=0.95))
    first, again, alone, other = (
        [each.text for each in generate(config, params, prompts, **options, **more)]
        for more in ({}, {}, {"batch_size": 1}, {"seed": 1})
    )
    assert first == again == alone
    assert first != other


def test_streams_and_stop_strings():
    config = model_of("fai_split")
    while True:
        params = params_of(config)
        plain = generate(config, params, ["abc"], max_new_tokens=12, sampling=GREEDY)[0]
        if len(plain.text) > 4:
            break
    shown = []
    again = generate(
        config,
        params,
        ["abc"],
        max_new_tokens=12,
        sampling=GREEDY,
        on_text=lambda index, piece: shown.append((index, piece)),
    )[0]
    assert again == plain
    assert "".join(piece for _, piece in shown) == plain.text
    stop = plain.text[3:5]
    ended = generate(config, params, ["abc"], max_new_tokens=12, sampling=GREEDY, stop=[stop])[0]
    assert ended.finish == "stop"
    assert ended.text == plain.text[: plain.text.find(stop)]


@pytest.mark.parametrize(("tokens", "most"), [([97, 0xC3], 2), ([97, 0xC3, 256], 9)])
def test_a_stop_string_that_the_end_completes(tokens, most):
    """An open character becomes text when the text ends, by its length or by end-of-text."""
    row = generation._Row(0, [256], TextStream(ByteTokenizer(), ["\ufffd"]))
    pieces = []
    for token in tokens:
        generation._append(row, token, ByteTokenizer(), most, lambda _, piece: pieces.append(piece))
    assert (row.finish, row.stream.text, "".join(pieces)) == ("stop", "a", "a")


def test_a_penalty_prevents_repetition():
    config = model_of("no_split", init_std=0.02)
    params = params_of(config)
    sampling = Sampling(temperature=0, repetition_penalty=1e6)
    seen = np.zeros((1, 300), bool)
    found = generate(config, params, ["abcd"], max_new_tokens=15, sampling=sampling)[0]
    assert not seen.any()
    ids = found.text.encode(errors="ignore")
    assert len(set(found.text.replace("\ufffd", ""))) == len(found.text.replace("\ufffd", ""))
    assert not set("abcd") & set(found.text), ids


@pytest.mark.parametrize("declared", [64, 4096])
def test_caches_are_as_long_as_the_text_needs(declared, monkeypatch):
    """Not as long as the model could read: for 130 tokens, the next power of two."""
    lengths = []
    prefill = models.prefill

    def recorded(*arguments, length, **options):
        lengths.append(length)
        return prefill(*arguments, length=length, **options)

    monkeypatch.setattr(models, "prefill", recorded)
    config = small_config("fai_split", model={"context": declared}).model
    params = models.init(config, jax.random.key(0))
    generate(config, params, ["a" * 127], max_new_tokens=2, sampling=Sampling(temperature=0))
    assert lengths == [256]


def test_a_penalty_exempts_the_token_that_begins_a_document(monkeypatch):
    """Penalizing it, which is also the end-of-text token, would keep every text from ending."""
    config = small_baseline("llama", vocab_size=257)
    params = models.init(config, jax.random.key(0))
    given = []
    step = generation.sample

    def recorded(logits, seen, keys, sampling):
        given.append(seen)
        return step(logits, seen, keys, sampling)

    monkeypatch.setattr(generation, "sample", recorded)
    with jax.disable_jit():
        generate(
            config, params, ["Hi"], max_new_tokens=1, sampling=Sampling(repetition_penalty=2.0)
        )
    assert np.flatnonzero(given[0][0]).tolist() == sorted(b"Hi")


def test_a_text_ends_at_the_context_of_its_split_or_continues_in_a_new_window():
    config = model_of("fac_split", context=12)
    params = params_of(config)
    options = dict(max_new_tokens=20, sampling=GREEDY)
    prompt = "abcdef"
    ended = generate(config, params, [prompt], **options)[0]
    # The first token and six bytes leave room for five tokens; the last position predicts a sixth.
    longest = recomputed(config, params, prompt, 6)
    if longest[-1] != 256:
        assert (ended.finish, ended.tokens) == ("context", 6)
    replanned = generate(config, params, [prompt, "x"], **options, replan=True)
    window, ids = [256, *prompt.encode()], []
    while len(ids) < 20 and (not ids or ids[-1] != 256):
        ids.append(likeliest(config, params, window))
        window.append(ids[-1])
        if len(window) > 12:
            window = window[-6:]
    text = bytes(i for i in ids if i < 256).decode(errors="replace")
    assert (replanned[0].tokens, replanned[0].text) == (len(ids), text)


def test_one_compiled_step_and_one_prefill_for_each_bucket():
    config = model_of("fac_split", context=64, blocks=2)
    params = params_of(config)
    before = generation._advance._cache_size(), models.prefill._cache_size()
    for prompt, count in (("ab", 3), ("abcdefgh", 5), ("a" * 20, 4), ("b" * 30, 2)):
        generate(config, params, [prompt], max_new_tokens=count, sampling=GREEDY)
    after = generation._advance._cache_size(), models.prefill._cache_size()
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        1,
        2,
    ]  # prefills of 16 and 32 tokens


def test_ids_outside_the_tokenizers_vocabulary_are_never_chosen():
    config = model_of("mamba1", vocab_size=4096)
    params = params_of(config)
    found = generate(config, params, ["a"] * 4, max_new_tokens=10)
    assert all(each.tokens == 10 or each.finish == "end_of_text" for each in found)
    assert all(each.text for each in found if each.tokens > 1)


def test_the_clock_does_not_count_the_first_token():
    config = model_of("llama")
    clock = Clock()
    params = params_of(config)
    found = generate(config, params, ["a", "b"], max_new_tokens=5, sampling=GREEDY, clock=clock)
    assert clock.tokens == sum(each.tokens - 1 for each in found)
    assert clock.tokens_per_second == clock.tokens / clock.seconds
    assert Clock().tokens_per_second is None


@pytest.mark.parametrize("replan", [False, True])
def test_progress_counts_all_tokens_also_of_texts_that_end_early(replan):
    config = model_of("fac_split", context=12)
    counts = []
    options = dict(max_new_tokens=20, batch_size=2, replan=replan, on_progress=counts.append)
    generate(config, params_of(config), ["abcdefgh", "x", "yz"], **options)
    assert sum(counts) == 3 * 20
    assert min(counts) > 0
    assert len(counts) > 2


def test_buckets():
    assert [bucket(length) for length in (1, 16, 17, 33)] == [16, 16, 32, 64]
    assert bucket(40, 50) == 50
    assert all(a <= b for a, b in itertools.pairwise(map(bucket, range(1, 99))))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", ""], {}, "Prompt 2 must not be empty"),
        (["a" * 24], {}, "at most 24 tokens, the context that fac_split is planned for; got 25"),
        (["\udcff"], {}, "Prompt 1 must be UTF-8 text"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens must be 1 or more; got 0"),
        (["a"], {"batch_size": 0}, "batch_size must be 1 or more; got 0"),
        (["a"], {"stop": ["x", ""]}, "Every stop string must have a character"),
    ],
)
def test_bad_arguments_are_refused(prompts, options, message):
    config = model_of("fac_split")
    with pytest.raises(
        ValueError, match="replan is for splits tied to their context; llama continues"
    ):
        flowhn_jax.generate(model_of("llama"), {}, ["a"], replan=True)
    with pytest.raises(ValueError, match=message):
        flowhn_jax.generate(config, {}, prompts, **options)


def test_a_tokenizer_larger_than_the_model_is_refused():
    config = small_config("fac_split", model={"vocab_size": 99}).model
    with pytest.raises(
        ValueError, match=r"vocab_size must be at least the tokenizer's 257 tokens; got 99"
    ):
        generate(config, {}, ["a"])
