"""What all layers of a model are built with."""

import dataclasses

import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """Settings that every layer of a model shares.

    Attributes:
      rngs: keys of the initial parameters; the order in which layers draw them is part of a model.
      dtype: the dtype of matrix products and activations.
      init_std: standard deviation of the normal initial weights.
      norm_eps: added to the mean square in RMS norms.
    """

    rngs: nnx.Rngs
    dtype: jnp.dtype
    init_std: float
    norm_eps: float
