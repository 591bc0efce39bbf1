import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from flowhn_jax.split import (
    BlockPlan,
    Selection,
    SplitConfig,
    contains,
    count,
    make_plan,
    merge,
    take,
)
from flowhn_jax.split.selection import EVERYTHING
from tests.split.strategies import DIMS, plans


@settings(max_examples=25)
@given(plan=plans())
def test_take_and_merge_are_inverse(plan):
    @jax.jit
    def there_and_back(x):
        taken = [(take(x, block.attention), take(x, block.ssm)) for block in plan.blocks]
        return taken, [
            merge(*branches, block) if block.is_split else x
            for branches, block in zip(taken, plan.blocks, strict=True)
        ]

    x = np.random.default_rng(plan.length).normal(size=(2, plan.length, 3)).astype(np.float32)
    taken, merged = there_and_back(x)
    for block, branches in zip(plan.blocks, taken, strict=True):
        for branch, selection in zip(branches, (block.attention, block.ssm), strict=True):
            positions = [p for p in range(plan.length) if selection.contains(p)]
            np.testing.assert_array_equal(branch, x[:, positions])
    for each in merged:
        np.testing.assert_array_equal(each, x)


@settings(max_examples=25)
@given(plan=plans())
def test_only_slices_reshapes_and_concatenations(plan):
    block = plan.blocks[-1]

    def there_and_back(x):
        attention, ssm = take(x, block.attention), take(x, block.ssm)
        return merge(attention, ssm, block) if block.is_split else attention + ssm

    x = jnp.zeros((2, plan.length, 3))
    allowed = {"slice", "reshape", "concatenate", "broadcast_in_dim", "add"}
    forward = {equation.primitive.name for equation in jax.make_jaxpr(there_and_back)(x).eqns}
    assert forward <= allowed, forward
    backward = str(jax.make_jaxpr(jax.grad(lambda x: there_and_back(x).sum()))(x))
    assert "gather" not in backward
    assert "scatter" not in backward


# Whole periods and a tail that cuts a run short, a wrapped window, a run outside the tail.
SELECTIONS = [
    (Selection(7, ((2, 5),)), 24),
    (Selection(7, ((2, 5),)), 23),
    (Selection(7, ((0, 1), (4, 7))), 27),
    (Selection(10, ((0, 2), (7, 10))), 10),
    (Selection(10, ((8, 10),)), 5),
    (Selection(10, ((0, 2), (8, 10))), 9),
    (Selection(4, ()), 9),
    (Selection(4, ()), 3),
    (EVERYTHING, 5),
]


@jax.jit
def taken_and_merged(sequences):
    found = []
    for x, (selection, _) in zip(sequences, SELECTIONS, strict=True):
        plan = BlockPlan(selection, selection.complement())
        attention, ssm = take(x, plan.attention), take(x, plan.ssm)
        found.append((attention, ssm, merge(attention, ssm, plan) if plan.is_split else x))
    return found


def test_take_and_merge_of_known_selections():
    sequences = [np.arange(2.0 * length).reshape(2, length, 1) for _, length in SELECTIONS]
    for x, (selection, length), (attention, ssm, merged) in zip(
        sequences, SELECTIONS, taken_and_merged(sequences), strict=True
    ):
        chosen = [
            any(start <= position % selection.period < stop for start, stop in selection.runs)
            for position in range(length)
        ]
        np.testing.assert_array_equal(attention, x[:, chosen])
        np.testing.assert_array_equal(ssm, x[:, np.logical_not(chosen)])
        np.testing.assert_array_equal(merged, x)


def test_contains_and_count_agree_with_the_selection():
    """For positions and lengths that are only known at run time."""
    numbers = np.arange(30).reshape(5, 6)
    asked = jax.jit(lambda x: [(contains(s, x), count(s, x)) for s, _ in SELECTIONS])(numbers)
    for (selection, _), (chosen, below) in zip(SELECTIONS, asked, strict=True):
        assert (chosen.dtype, below.dtype) == (bool, np.int32)
        expected = [selection.contains(position) for position in range(30)]
        np.testing.assert_array_equal(chosen.ravel(), expected)
        np.testing.assert_array_equal(below.ravel(), [selection.count(n) for n in range(30)])
        assert [selection.count(n) for n in range(30)] == [sum(expected[:n]) for n in range(30)]


def test_gradient_flows_to_each_position_once():
    """Merging what was taken has the identity as its Jacobian."""
    plan = make_plan(SplitConfig("fai_split", period=7), DIMS, blocks=3, context=24)

    def identities(x):
        return [
            merge(take(x, block.attention), take(x, block.ssm), block)[0, :, 0]
            for block in plan.blocks
        ]

    for jacobian in jax.jit(jax.jacobian(identities))(jnp.arange(24.0)[None, :, None]):
        np.testing.assert_array_equal(jacobian[:, 0, :, 0], np.eye(24))
