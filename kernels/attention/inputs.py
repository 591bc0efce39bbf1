"""The inputs of attention, as its backends take them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class AttentionInputs(NamedTuple):
    """The arrays of `kernels.attention.attention`, which describes them."""

    q: Array
    k: Array
    v: Array
    segment_ids: Array | None = None

    def vectors(self) -> dict[str, Array]:
        """Return queries, keys and values by name."""
        return {"q": self.q, "k": self.k, "v": self.v}


class Visibility(NamedTuple):
    """What a query sees of its causal past besides the mask of documents.

    Attributes:
      window: number of positions, its own included; None: all.
      prefix: number of leading positions that all later ones see.
      queries: ascending positions of the queries among the keys; None: all.
    """

    window: int | None = None
    prefix: int = 0
    queries: tuple[int, ...] | None = None


def pad_length(inputs: AttentionInputs, tail: int) -> AttentionInputs:
    """Return the inputs with `tail` positions of zeros after the last one."""
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0))) for x in (inputs.q, inputs.k, inputs.v)
    )
    ids = inputs.segment_ids
    return AttentionInputs(q, k, v, None if ids is None else jnp.pad(ids, ((0, 0), (0, tail))))
