"""Walks over jaxprs and what is inside them."""

import jax


def jaxprs(jaxpr, *, opaque=()):
    """Yield a jaxpr and all jaxprs inside it.

    Args:
      jaxpr: the outermost one, which is open, as `ClosedJaxpr.jaxpr` is.
      opaque: how the names of primitives begin whose jaxprs are left out.
    """
    yield jaxpr
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(tuple(opaque)):
            continue
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from jaxprs(inner, opaque=opaque)


def equations(jaxpr, *, opaque=()):
    """Yield the equations of a jaxpr and of all jaxprs inside it; see `jaxprs`."""
    for each in jaxprs(jaxpr, opaque=opaque):
        yield from each.eqns
