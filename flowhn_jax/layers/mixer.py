"""The protocol of mixers: what a decoder layer expects of the module that mixes its tokens."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import jax

from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.split import Selection

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
          tokens: the number of the sequence's tokens.
          causal: whether attention counts only pairs at or before the query, not all tokens².
        """
        ...


class SelectiveMixer(Mixer[CacheT], Protocol[CacheT]):
    """A mixer that can read all tokens of a sequence and have outputs for some of them only."""

    def mix_selected(
        self, x: jax.Array, segment_ids: jax.Array | None, selection: Selection
    ) -> jax.Array:
        """Return the mixed tokens of `selection`, [B, count, D]; x [B, T, D] are all tokens."""
        ...

    def prefill_selected(
        self, x: jax.Array, prompts: Prompts, length: int, selection: Selection
    ) -> tuple[jax.Array, CacheT]:
        """Return the mixed tokens of `selection`, and the cache after each row's last real token.

        The arguments are those of `prefill`, of all tokens.
        """
        ...

    def read(self, x: jax.Array, cache: CacheT) -> tuple[Callable[[], jax.Array], CacheT]:
        """Return a function that mixes the tokens x [B, D], and the cache after them.

        The function costs nothing where it is not called.
        """
        ...

    def selected_share(self, name: str) -> float:
        """Return the share of a linear layer's work that is done for the selected tokens alone.

        Args:
          name: the name of the layer, or 'mixing' for the work of `mixing_flops`.
        """
        ...
