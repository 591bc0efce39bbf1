"""Text to token windows on disk: `python -m flowhn_jax.data.prepare --help`."""

from flowhn_jax.data.prepare.preparation import ShardsMissing, ensure_embedded, prepare

__all__ = ["ShardsMissing", "ensure_embedded", "prepare"]
