"""Text to token windows on disk: `python -m flowhn_jax.data.prepare --help`."""

from flowhn_jax.data.prepare.preparation import ensure_embedded, prepare

__all__ = ["ensure_embedded", "prepare"]
