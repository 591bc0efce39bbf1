import pytest

from flowhn_jax.evaluation.harness_settings import GenerationSettings
from flowhn_jax.evaluation.sampling import Sampling

GREEDY = Sampling(temperature=0.0)


def parse(context=64, **settings):
    return GenerationSettings.parse(settings, context)


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({}, GREEDY),
        ({"do_sample": False, "temperature": 1.0}, GREEDY),
        ({"temperature": 0}, GREEDY),
        ({"temperature": 0.5}, Sampling(temperature=0.5)),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        ({"do_sample": True, "temperature": 0.7, "top_k": 5}, Sampling(0.7, 5)),
        ({"temperature": 1.0, "top_k": 0, "top_p": 0.9}, Sampling(1.0, None, 0.9)),
        ({"temperature": 1, "min_p": 0.1, "num_beams": 1}, Sampling(1.0, min_p=0.1)),
        ({"repetition_penalty": 1.5}, Sampling(0.0, repetition_penalty=1.5)),
        ({"top_k": None, "temperature": None, "do_sample": None}, GREEDY),
    ],
)
def test_sampling(settings, sampling):
    assert parse(**settings).sampling == sampling


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 32),  # half the context
        ({"max_gen_toks": 63}, 63),
        ({"max_new_tokens": 5}, 5),
        ({"max_tokens": 5.0, "max_gen_toks": 5}, 5),
        ({"max_completion_tokens": 1}, 1),
    ],
)
def test_new_tokens(settings, count):
    assert parse(**settings).max_new_tokens == count
    assert parse(context=4096).max_new_tokens == 256


def test_stop_strings():
    assert parse().stop == ()
    assert parse(until="\n").stop == ("\n",)
    assert parse(until=["a", "", "b"]).stop == ("a", "b")
    for until in ("a", ["a", "</s>"]):
        assert GenerationSettings.parse({"until": until}, 64, "</s>").stop == ("a", "</s>")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"typical_p": 0.9}, "setting must be one of max_gen_toks, .*; got 'typical_p'"),
        ({"num_beams": 4}, "num_beams must be 1, .*; got 4"),
        ({"do_sample": "yes"}, "do_sample must be true or false; got 'yes'"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0 where do_sample"),
        ({"temperature": "warm"}, "temperature must be a number; got 'warm'"),
        ({"temperature": True}, "temperature must be a number; got True"),
        ({"temperature": -1}, "temperature must be 0 or more; got -1.0"),
        ({"top_k": 1.5}, "top_k must be an integer; got 1.5"),
        ({"top_k": -1}, "top_k must be 1 or more; got -1"),
        ({"top_p": 2}, "top_p must be above 0 and at most 1; got 2.0"),
        ({"max_gen_toks": 64}, "max_gen_toks must be 1 to 63, less than the context of 64 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 to 63, .* got 0"),
        ({"max_tokens": 1.5}, "max_tokens must be 1 to 63, .* got 1.5"),
        ({"max_gen_toks": 1, "max_new_tokens": 2}, "max_gen_toks and max_new_tokens mean the same"),
        ({"until": 5}, "until must be a text or a list of texts; got 5"),
        ({"until": ["a", 5]}, "until must be a text or a list of texts"),
    ],
)
def test_unsupported_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        parse(**settings)
