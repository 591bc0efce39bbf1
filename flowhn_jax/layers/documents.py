"""Documents of packed sequences that all begin after the same prefix tokens.

The prefix, such as Hymba's meta tokens, occurs once, before the first document of a row. Every
later document starts from the state after the prefix, as if the prefix were repeated before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class DocumentIndex(NamedTuple):
    """Positions of tokens within their documents.

    Attributes:
      position: [B, T] int32, tokens of the same document before each token.
      is_later: [B, T] bool, whether a token is of a later document than the first of its row.
    """

    position: jax.Array
    is_later: jax.Array


def index_documents(segment_ids: jax.Array) -> DocumentIndex:
    """Return the index of documents segment_ids [B, T], each contiguous."""
    positions = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    start = lax.cummax(jnp.where(starts, positions, 0), axis=1)
    return DocumentIndex(positions - start, start > 0)


def positions_after_prefix(segment_ids: jax.Array, prefix: int) -> jax.Array:
    """Return positions [B, T] that start at `prefix` in every document but a row's first."""
    position, is_later = index_documents(segment_ids)
    return position + jnp.where(is_later, prefix, 0)


def convolved_prefix(table: jax.Array, index: DocumentIndex) -> jax.Array:
    """Return what the prefix adds to a convolution of later documents, [B, T, E] in float32.

    Args:
      table: [W - 1, E] float32, outputs at a document's first tokens for the prefix alone.
      index: the index of the tokens.
    """
    total = jnp.zeros((*index.position.shape, table.shape[1]), jnp.float32)
    for position, row in enumerate(table):
        sees = index.is_later & (index.position == position)
        total += jnp.where(sees[..., None], row, 0)
    return total


def elapsed_in_documents(delta: jax.Array, index: DocumentIndex) -> jax.Array:
    """Return the sum of time steps delta [B, T, E] from the document's start to each token.

    The sum is taken within each document: differences of sums over the row would lose digits.
    """
    starts = jnp.broadcast_to((index.position == 0)[..., None], delta.shape)

    def add(first, second):
        (starts_1, sum_1), (starts_2, sum_2) = first, second
        return starts_1 | starts_2, jnp.where(starts_2, sum_2, sum_1 + sum_2)

    return lax.associative_scan(add, (starts, delta), axis=1)[1]


def scanned_prefix(
    elapsed: jax.Array, A: jax.Array, C: jax.Array, state: jax.Array, index: DocumentIndex
) -> jax.Array:
    """Return what the state after the prefix adds to a scan's outputs, [B, T, E] in float32.

    The scan is linear in its state, so y of later documents is that of a scan from zero plus the
    sum over s of C[s] exp(A[s] elapsed) state[s]. No array of all states [B, T, E, S] is made,
    neither here nor in the backward pass.

    Args:
      elapsed: [B, T, E] float32, from `elapsed_in_documents`.
      A: [E, S] float32.
      C: [B, T, S].
      state: [E, S] float32, after the prefix.
      index: the index of the tokens.
    """

    @jax.checkpoint
    def add(total: jax.Array, of_state: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        A, state, C = of_state
        return total + jnp.exp(elapsed * A) * state * C[..., None], None

    C = jnp.where(index.is_later[..., None], C.astype(jnp.float32), 0)
    of_states = A.T, state.T, jnp.moveaxis(C, 2, 0)
    return lax.scan(add, jnp.zeros_like(elapsed), of_states)[0]
