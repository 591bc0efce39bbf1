"""Equal layers of a stack, traced and lowered as one function."""

from typing import Any

import jax
from flax import nnx


class TracedOnce:
    """Calls modules; those of equal structure share one trace, and one function in the program.

    XLA inlines the calls, so the compiled program is that of separate traces. Make one object per
    traced function: `kernels.backends.record` records nothing for a trace that is reused.
    """

    def __init__(self):
        self._functions: dict[nnx.GraphDef[Any], Any] = {}

    def __call__(self, module: nnx.Module, *arrays: jax.Array | None) -> jax.Array:
        """Return module(*arrays)."""
        graph, params = nnx.split(module)
        if graph not in self._functions:

            def layer(params: nnx.State, *arrays: jax.Array | None) -> jax.Array:
                return nnx.merge(graph, params)(*arrays)

            self._functions[graph] = jax.jit(layer)
        return self._functions[graph](params, *arrays)
