"""What the tests of all kernels share."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.jaxprs import equations


def assert_close(actual, expected, tolerance, scale=1e-9):
    """Assert that differences are below the tolerance times the largest expected magnitude.

    A tensor whose magnitude is below `scale` may differ like one of that magnitude: a small
    difference of large terms has their rounding errors, and an exact zero those of float64.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a = np.asarray(a, np.float64)
        assert a.shape == e.shape, path
        error = np.max(np.abs(a - e), initial=0)
        assert error <= tolerance * np.max(np.abs(e), initial=scale), (path, error)


def cotangents_like(rng, outputs):
    """Return random arrays with the shapes and dtypes of the outputs."""
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), outputs)


def with_gradients(run):
    """Return a function of (args, cotangents): run(args), and the gradients of its float args.

    Without cotangents it takes the outputs themselves.
    """

    def run_with_gradients(args, cotangents=None):
        floats = {name: x for name, x in args.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        outputs, vjp = jax.vjp(lambda floats: run(args | floats), floats)
        return outputs, vjp(outputs if cotangents is None else cotangents)[0]

    return run_with_gradients


def array_sizes(jaxpr):
    """Yield the sizes of all arrays that a jaxpr, or a jaxpr inside it, computes."""
    for equation in equations(jaxpr):
        yield from (variable.aval.size for variable in equation.outvars)
