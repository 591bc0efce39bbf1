import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowhn_jax.evaluation.sampling import Sampling, filter_logits, sample

LOGITS = np.log(np.array([[0.5, 0.25, 0.15, 0.07, 0.03]], np.float32))
NONE_SEEN = np.zeros((1, 5), bool)


def kept(**options):
    left = np.asarray(filter_logits(jnp.asarray(LOGITS), NONE_SEEN, Sampling(**options)))
    return np.flatnonzero(np.isfinite(left[0])).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.6}, [0, 1]),  # 0.56 and 0.28 of the three left
        ({"temperature": 4.0, "min_p": 0.55}, [0, 1, 2, 3]),
    ],
)
def test_filters_keep_what_they_should(options, expected):
    assert kept(**options) == expected


def test_defaults_change_nothing():
    """Except for a shift of all logits, which changes no probability."""
    left = filter_logits(jnp.asarray(LOGITS), ~NONE_SEEN, Sampling())
    np.testing.assert_array_equal(left, LOGITS - LOGITS.max())
    # Tokens too unlikely for float32 sums of probabilities are kept, too.
    unlikely = jnp.asarray([[0.0, -30.0, -200.0]])
    left = filter_logits(unlikely, np.zeros((1, 3), bool), Sampling())
    np.testing.assert_array_equal(left, unlikely)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, [[0], [3], [0, 1, 2, 3]]),  # ties are all kept
        ({"top_k": 2}, [[0, 1], [2, 3], [0, 1, 2, 3]]),
        ({"top_k": 4}, [[0, 1, 2, 3]] * 3),
        ({"top_p": 0.5}, [[0], [3], [0, 1, 2, 3]]),
        ({"top_p": 0.93}, [[0, 1, 2], [1, 2, 3], [0, 1, 2, 3]]),
        ({"min_p": 0.3}, [[0, 1], [2, 3], [0, 1, 2, 3]]),
        # top_k keeps 0.625, 0.3125 and 0.0625, of which top_p needs two.
        ({"top_k": 3, "top_p": 0.7}, [[0, 1], [2, 3], [0, 1, 2, 3]]),
    ],
)
def test_each_row_is_filtered_by_its_own_probabilities(options, expected):
    rows = np.log([[0.6, 0.3, 0.06, 0.04], [0.04, 0.06, 0.3, 0.6], [0.25] * 4]).astype(np.float32)
    left = filter_logits(jnp.asarray(rows), np.zeros((3, 4), bool), Sampling(**options))
    assert [np.flatnonzero(~np.isneginf(row)).tolist() for row in np.asarray(left)] == expected


def test_the_penalty_applies_to_seen_tokens():
    logits = jnp.array([[0.5, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    left = filter_logits(logits, seen, Sampling(temperature=0, repetition_penalty=2.0))
    np.testing.assert_array_equal(left, [[0.25, -4.0, 2.0, -2.0]])
    left = filter_logits(logits, seen, Sampling(temperature=0, repetition_penalty=0.5))
    np.testing.assert_array_equal(left, [[1.0, -1.0, 2.0, -2.0]])
    # It applies before the temperature, so the largest logit is that of the third token.
    left = filter_logits(logits, seen, Sampling(temperature=0.5, repetition_penalty=2.0))
    np.testing.assert_array_equal(left, [[-3.5, -12.0, 0.0, -8.0]])


@given(
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_the_likeliest_token_is_always_kept_and_so_is_the_order(
    temperature, top_k, top_p, min_p, seed
):
    logits = np.random.default_rng(seed).normal(size=(3, 11)).astype(np.float32)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    left = np.asarray(filter_logits(jnp.asarray(logits), np.zeros((3, 11), bool), sampling))
    for row, original in zip(left, logits, strict=True):
        finite = np.isfinite(row)
        assert finite[original.argmax()]
        below = (
            original[finite] - original.max()
        ) / temperature  # the shift changes no probability
        np.testing.assert_allclose(row[finite], below, rtol=1e-5, atol=1e-6)
        assert original[finite].min() >= original[~finite].max(initial=-np.inf)
        if top_k is not None:
            assert finite.sum() <= top_k


def test_frequencies_are_the_probabilities():
    count = 4000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (count, 5))
    keys = jax.random.split(jax.random.key(3), count)
    chosen = np.asarray(sample(logits, np.zeros((count, 5), bool), keys, Sampling(top_k=3)))
    found = np.bincount(chosen, minlength=5) / count
    np.testing.assert_allclose(found, [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0], atol=0.04)


@pytest.mark.parametrize("temperature", [1e-10, 1e-30, 1e-38, 1e-45, 1e-300])
def test_a_tiny_temperature_chooses_the_likeliest_token(temperature):
    logits = jnp.asarray([[-3.0, 2.0, 2.5, -1e4], [-40.0, -20.0, -30.0, -25.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    seen = np.zeros((2, 4), bool)
    assert sample(logits, seen, keys, Sampling(temperature)).tolist() == [2, 1]


def test_top_p_keeps_no_token_once_it_is_reached_exactly():
    """As in transformers: a token is dropped if those before it already add up to top_p."""
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125]]))
    for top_p, count in ((0.5, 1), (0.75, 2), (0.7500001, 4)):  # the last two tie
        left = filter_logits(logits, np.zeros((1, 4), bool), Sampling(top_p=top_p))
        assert np.isfinite(np.asarray(left)).sum() == count


def test_temperature_zero_is_greedy():
    keys = jax.random.split(jax.random.key(0), 64)
    logits, seen = np.repeat(LOGITS, 64, 0), np.repeat(NONE_SEEN, 64, 0)
    chosen = sample(jnp.asarray(logits), seen, keys, Sampling(temperature=0, top_p=0.1))
    assert (chosen.dtype, chosen.tolist()) == (np.int32, [0] * 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more; got -1.0"),
        ({"top_k": 0}, "top_k must be 1 or more; got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
        ({"min_p": -0.1}, "min_p must be 0 to 1; got -0.1"),
        ({"min_p": 2.0}, "min_p must be 0 to 1; got 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0; got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_options_at_their_limits_are_valid():
    Sampling(temperature=0, top_k=1, top_p=1, min_p=0, repetition_penalty=1e-9)
    Sampling(temperature=1e9, top_p=1e-9, min_p=1)
