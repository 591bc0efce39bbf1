"""What the mixers Mamba-1 and Mamba-2 share: the uses of one body that mixes whole sequences."""

import abc
from typing import Generic, NamedTuple

import jax
from flax import nnx

from flowhn_jax.layers.mixer import CacheT
from flowhn_jax.layers.prompts import Prompts, where_active
from flowhn_jax.split import Selection
from flowhn_jax.split.selection import EVERYTHING


class SequenceInputs(NamedTuple):
    """Whole sequences for a mixer.

    Attributes:
      x: [B, T, D].
      segment_ids: [B, T] int32; nothing passes between documents. None: one document.
      prompts: for rows with padding after their tokens, whose last states are needed; None: of rows
        without padding.
      selection: the tokens that are gated and projected; all enter the scan.
    """

    x: jax.Array
    segment_ids: jax.Array | None
    prompts: Prompts | None = None
    selection: Selection = EVERYTHING


class StateSpaceMixer(nnx.Module, Generic[CacheT]):
    """A `SelectiveMixer` with a causal convolution of W taps, and a scan with a state.

    Attributes:
      conv: W.
      prefix: number of leading tokens, the same in all rows, that every document of a packed row
        follows.
    """

    conv: int
    prefix: int = 0

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Return the mixed tokens [B, T, D]; the state restarts with each document."""
        return self._mix(SequenceInputs(x, segment_ids))[0]

    def mix_selected(
        self, x: jax.Array, segment_ids: jax.Array | None, selection: Selection
    ) -> jax.Array:
        """Return the mixed tokens of `selection`, [B, count, D]; x [B, T, D] are all tokens."""
        return self._mix(SequenceInputs(x, segment_ids, selection=selection))[0]

    def prefill(self, x: jax.Array, prompts: Prompts, length: int) -> tuple[jax.Array, CacheT]:
        """Return the mixed tokens [B, T, D], and the cache after each row's tokens."""
        return self.prefill_selected(x, prompts, length, EVERYTHING)

    def prefill_selected(
        self, x: jax.Array, prompts: Prompts, length: int, selection: Selection
    ) -> tuple[jax.Array, CacheT]:
        """Return the mixed tokens of `selection`, and the cache after each row's tokens.

        The size of the cache does not depend on `length`.
        """
        del length
        inputs = SequenceInputs(x, prompts.segment_ids, prompts, selection)
        y, convolved, state = self._mix(inputs)
        assert state is not None
        conv = prompts.tail(convolved, self.conv - 1, self.prefix)
        return y, self._cache(conv, prompts.reset_state(state))

    def step(
        self, x: jax.Array, cache: CacheT, active: jax.Array | None = None
    ) -> tuple[jax.Array, CacheT]:
        """Return the mixed token of each sequence [B, D], and the resulting cache.

        A sequence that is not `active` [B] keeps its cache; its output is undefined.
        """
        y, new_cache = self._advance(x, cache)
        return y, where_active(active, new_cache, cache)

    @abc.abstractmethod
    def _mix(self, inputs: SequenceInputs) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Return the mixed tokens of the selection, the convolution's inputs, and the last states.

        Without prompts, the states may be missing.
        """

    @abc.abstractmethod
    def _advance(self, x: jax.Array, cache: CacheT) -> tuple[jax.Array, CacheT]:
        """Return the mixed token of each sequence [B, D], and the cache after it."""

    @abc.abstractmethod
    def _cache(self, conv: jax.Array, state: jax.Array) -> CacheT:
        """Return the cache of the convolution's last inputs and the scan's state."""
