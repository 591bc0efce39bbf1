"""Routes of a learned split against the rule, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowhn_jax.split import Quota
from flowhn_jax.split.routing import (
    count_attended,
    make_routes,
    merge_routed,
    step_routes,
    take_routed,
)


def routes_by_the_rule(scores, quota):
    """Return which tokens [B, T] go to attention: one after the other, by a count per window."""
    attends = np.zeros(scores.shape, bool)
    for row, of_row in enumerate(scores):
        for t, score in enumerate(of_row):
            if t % quota.period == 0:
                left = quota.width
            needs_all = left == quota.period - t % quota.period
            attends[row, t] = left > 0 and (score > 0 or needs_all)
            left -= attends[row, t]
    return attends


# Whole windows, last ones shorter and longer than the quota; few, since each is compiled.
SHAPES = (
    (Quota(3, 1), 1),
    (Quota(3, 2), 13),
    (Quota(5, 2), 20),
    (Quota(5, 4), 12),
    (Quota(9, 4), 31),
)
ROWS = 2


@st.composite
def cases(draw):
    """Draw a quota, and scores of which a share passes; some are exactly zero."""
    quota, length = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.normal(draw(st.sampled_from([-9, -1, 0, 1, 9])), 1, (ROWS, length))
    return quota, np.where(rng.random(scores.shape) < 0.1, 0, scores).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def routed(quota, scores, x):
    """Return the routes, the counts of every prefix, the branches' tokens, and these merged."""
    routes = make_routes(scores, quota)
    lengths = range(scores.shape[1] + 1)
    counts = jnp.stack([count_attended(routes, jnp.full(ROWS, n)) for n in lengths], 1)
    taken = take_routed(x, routes, quota)
    return routes, counts, taken, merge_routed(*taken, routes, quota)


@given(case=cases())
def test_routes_are_those_of_the_rule(case):
    """Each whole window sends its quota, both branches have room, tokens stay in order."""
    quota, scores = case
    length = scores.shape[1]
    x = np.arange(ROWS * length * 3).reshape(ROWS, length, 3)
    routes, counts, taken, merged = jax.device_get(routed(quota, scores, x))
    attends = routes_by_the_rule(scores, quota)
    np.testing.assert_array_equal(routes.attends, attends)
    np.testing.assert_array_equal(counts[:, 1:], attends.cumsum(1))
    assert (counts[:, :: quota.period] == np.arange(length // quota.period + 1) * quota.width).all()
    np.testing.assert_array_equal(
        np.take_along_axis(routes.order, routes.slots, 2),
        np.broadcast_to(np.arange(quota.period), routes.order.shape),
    )
    for branch, mine, room in zip(
        taken, (attends, ~attends), (quota, quota.complement()), strict=True
    ):
        assert branch.shape[1] == room.count(length)
        for row, chosen in enumerate(mine):
            own = x[row][chosen]
            np.testing.assert_array_equal(branch[row, : len(own)], own)
            free = branch[row, len(own) :]  # of a cut window
            np.testing.assert_array_equal(free, np.broadcast_to(x[row, -1], free.shape))
    np.testing.assert_array_equal(merged, x)


@given(case=cases(), data=st.data())
def test_a_route_depends_on_no_later_score(case, data):
    quota, scores = case
    t = data.draw(st.integers(0, scores.shape[1] - 1))
    changed = scores.copy()
    changed[:, t + 1 :] *= -1
    before, after = (routed(quota, x, x)[0].attends[:, : t + 1] for x in (scores, changed))
    np.testing.assert_array_equal(before, after)


@settings(max_examples=25)
@given(case=cases(), data=st.data())
def test_steps_route_as_the_whole_sequence(case, data):
    """From any position of each row, with the count that the tokens before it left."""
    quota, scores = case
    length = scores.shape[1]
    expected = routes_by_the_rule(scores, quota)
    positions = np.array([data.draw(st.integers(0, length - 1)) for _ in range(ROWS)])
    starts = positions // quota.period * quota.period
    attended = np.array(
        [expected[i, starts[i] : positions[i]].sum() for i in range(ROWS)], np.int32
    )
    for _ in range(length - positions.max()):
        token = np.arange(ROWS), positions
        attends, attended = step_routes(scores[token], positions, attended, quota)
        np.testing.assert_array_equal(attends, expected[token])
        positions = positions + 1
    assert attended.dtype == np.int32


@pytest.mark.parametrize("length", [14, 17])
def test_gradients_are_gathers_and_reach_each_token_once(length, rng):
    """In whole windows, and with a cut one: no scatter, and an identity as Jacobian."""
    quota = Quota(7, 4)
    routes = make_routes(rng.normal(size=(1, length)), quota)

    def there_and_back(x):
        attention, ssm = take_routed(x, routes, quota)
        return merge_routed(2 * attention, 3 * ssm, routes, quota)[0, :, 0]

    jacobian = jax.jacrev(there_and_back)(jnp.arange(float(length))[None, :, None])[:, 0, :, 0]
    factors = np.where(np.asarray(routes.attends[0]), 2, 3)
    np.testing.assert_array_equal(jacobian, np.diag(factors))
    x = jnp.zeros((1, length, 1))
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(lambda x: there_and_back(x).sum()))(x))
