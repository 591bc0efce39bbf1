"""FlowHN in JAX: attention and state-space branches that share the tokens."""

from typing import Any

__all__ = ["generate"]


def __getattr__(name: str) -> Any:
    """`flowhn_jax.generate`, as of `evaluation.generate`, without loading JAX before it is used."""
    if name != "generate":
        raise AttributeError(f"module 'flowhn_jax' has no attribute {name!r}")
    from flowhn_jax.evaluation.generate import generate

    return generate
