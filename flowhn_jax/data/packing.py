"""Packing: documents of any length into windows of one length, without gaps or lost tokens."""

import numpy as np


class Packer:
    """Packs a stream of documents into windows of N+1 tokens.

    A document's first token is EOT, which as a target ends the preceding document: the stream is
    [EOT] + tokens for each document, and a final EOT. With a BOS token, each document is
    [BOS] + tokens + [EOT] instead, and BOS is never a target. Either way, the targets are the
    tokens of the documents and one EOT for each.

    Windows start every N tokens, so that neighbors share one token and every token except the
    stream's first is a target exactly once. Segment ids number the documents within a window from
    1; where a number is skipped, the segment's first token is not a target. The last window is
    padded with EOT of segment 0, which is never a target (see `target_mask`).

    Attributes:
      targets: the number of targets so far.
      documents: the number of documents so far.
    """

    def __init__(self, context: int, eot_id: int, bos_id: int | None = None):
        """Make a packer.

        Args:
          context: N; windows have N+1 tokens.
          eot_id: the id of EOT, which ends every document.
          bos_id: the id of BOS, which begins every document; None: EOT begins it.
        """
        self.targets = 0
        self.documents = 0
        self._context = context
        self._eot = np.array([eot_id], np.int32)
        self._bos = None if bos_id is None else np.array([bos_id], np.int32)
        self._length = 0  # of the stream so far
        self._pending = 0  # tokens that have not been taken
        self._tokens = [np.empty(0, np.int32)]
        self._owners = [np.empty(0, np.int64)]  # the number of each token's document

    def start_document(self) -> None:
        """End the current document, if any, and start the next."""
        if self.documents:
            self.targets += 1
            if self._bos is not None:
                self._append(self._eot, self._owner)
        self.documents += 1
        self._append(self._eot if self._bos is None else self._bos, self._owner)

    def continue_document(self) -> None:
        """Start with the rest of a document, whose beginning is in windows of another packer."""
        self.documents = 1

    @property
    def _owner(self) -> int:
        """The document's number, which increases by two if its first token is not a target."""
        return self.documents if self._bos is None else 2 * self.documents

    def add(self, ids: np.ndarray) -> None:
        """Append ids [T] to the current document."""
        self.targets += len(ids)
        self._append(ids, self._owner)

    @property
    def complete_windows(self) -> int:
        """The number of windows that `take` would return."""
        return max(0, self._pending - 1) // self._context

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Remove and return the complete windows: int32 tokens and int64 segment ids, [W, N+1]."""
        tokens, owners = np.concatenate(self._tokens), np.concatenate(self._owners)
        windows = self.complete_windows
        taken = windows * self._context
        self._pending -= taken
        self._tokens, self._owners = [tokens[taken:]], [owners[taken:]]
        index = np.arange(windows)[:, None] * self._context + np.arange(self._context + 1)
        tokens, owners = tokens[index], owners[index]
        return tokens, np.where(owners > 0, owners - owners[:, :1] + 1, 0)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """End the stream; remove and return the remaining windows, of which the last is padded."""
        self.targets += 1
        self._append(self._eot, self._owner + (self._bos is None))
        padding = (1 - self._length) % self._context
        self._append(np.repeat(self._eot, padding), 0)
        return self.take()

    def _append(self, ids: np.ndarray, owner: int) -> None:
        self._length += len(ids)
        self._pending += len(ids)
        self._tokens.append(ids)
        self._owners.append(np.full(len(ids), owner))


def target_mask(segment_ids: np.ndarray) -> np.ndarray:
    """Return which targets count: bool [B, N] for segment ids [B, N+1] (NumPy or JAX).

    All count except padding and a document's BOS token, before which a segment number is skipped.
    The EOT after a document counts: the model learns to predict where a document ends.
    """
    targets = segment_ids[:, 1:]
    return (targets != 0) & (targets - segment_ids[:, :-1] < 2)
