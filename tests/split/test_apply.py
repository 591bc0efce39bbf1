import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from flowhn_jax.split import SplitConfig, make_plan, merge, take
from tests.split.strategies import DIMS, plans


@settings(max_examples=25)
@given(plan=plans())
def test_take_and_merge_are_inverse(plan):
    x = np.random.default_rng(plan.length).normal(size=(2, plan.length, 3)).astype(np.float32)
    for block in plan.blocks:
        attention, ssm = take(x, block.attention), take(x, block.ssm)
        for taken, selection in ((attention, block.attention), (ssm, block.ssm)):
            positions = [p for p in range(plan.length) if selection.contains(p)]
            np.testing.assert_array_equal(taken, x[:, positions])
        if block.is_split:
            np.testing.assert_array_equal(merge(attention, ssm, block), x)


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


def test_gradient_flows_to_each_position_once():
    """Merging what was taken has the identity as its Jacobian."""
    plan = make_plan(SplitConfig("fai_split", period=7), DIMS, blocks=3, context=24)
    x = jnp.arange(24.0)[None, :, None]
    for block in plan.blocks:

        def identity(x, block=block):
            return merge(take(x, block.attention), take(x, block.ssm), block)[0, :, 0]

        jacobian = jax.jacobian(identity)(x)[:, 0, :, 0]
        np.testing.assert_array_equal(jacobian, np.eye(24))
