"""The layers that models are made of: flax.nnx modules, used functionally."""
