"""The protocol of mixers: what a decoder layer expects of the module that mixes its tokens."""

from typing import Protocol, TypeVar

import jax

from flowhn_jax.layers.prompts import Prompts

CacheT = TypeVar("CacheT")


class Mixer(Protocol[CacheT]):
    """A module that mixes the tokens of a sequence causally, [B, T, D] to [B, T, D].

    A cache is a NamedTuple of arrays [B, ...]. It holds what later tokens need of earlier ones, so
    that `prefill` and then `step` per token give the outputs that one call gives.
    """

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Return the mixed tokens [B, T, D].

        Args:
          x: [B, T, D].
          segment_ids: [B, T] int32; documents never attend to each other. None: one document.
        """
        ...

    def prefill(self, x: jax.Array, prompts: Prompts, length: int) -> tuple[jax.Array, CacheT]:
        """Return the mixed tokens [B, T, D], and the cache after each row's last real token.

        Args:
          x: [B, T, D], rows with padding after their real tokens.
          prompts: lengths and documents of the rows.
          length: tokens per sequence that the cache must have room for.
        """
        ...

    def init_cache(self, batch: int, length: int) -> CacheT:
        """Return the cache of `batch` sequences before the first of `length` tokens."""
        ...

    def step(
        self, x: jax.Array, cache: CacheT, active: jax.Array | None = None
    ) -> tuple[jax.Array, CacheT]:
        """Return the mixed token of each sequence [B, D], and the resulting cache.

        Args:
          x: [B, D].
          cache: before this token.
          active: [B] bool; the other sequences keep their cache, and their output is undefined.
            None: all are active.
        """
        ...

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """Return the FLOPs of a sequence without those of the linear layers (`split/cost.py`).

        Args:
          tokens: of the sequence.
          causal: whether attention counts only pairs at or before the query, not all tokens².
        """
        ...
