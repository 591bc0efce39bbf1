"""FlowHN in JAX: language models whose blocks run attention and SSM branches in parallel."""

from typing import TYPE_CHECKING, Any

from flowhn_jax.utils.version import __version__

if TYPE_CHECKING:
    from flowhn_jax.evaluation.generate import generate

__all__ = ["__version__", "generate"]


def __getattr__(name: str) -> Any:
    """Import `generate`, and JAX with it, on first use."""
    if name != "generate":
        raise AttributeError(f"module 'flowhn_jax' has no attribute {name!r}")
    from flowhn_jax.evaluation.generate import generate

    return generate
