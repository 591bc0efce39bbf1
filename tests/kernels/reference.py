"""What the kernels' tests share."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_close(actual, expected, tolerance, scale=1e-9):
    """Every difference is below the tolerance times the largest expected magnitude.

    A tensor below `scale` may differ as one of that magnitude: what is a small difference of terms
    is rounded as they are, and what is zero but for the rounding of float64 as that is.
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
    """Random arrays of the shapes and dtypes of the outputs (or of their `jax.eval_shape`)."""
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), outputs)


def array_sizes(jaxpr):
    """The sizes of all arrays that a jaxpr computes, also in the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from array_sizes(inner)
