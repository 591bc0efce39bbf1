"""Packing: documents of any length into windows of one length, with nothing lost and no gaps."""

import numpy as np


class Packer:
    """Cuts a stream of documents into windows of N+1 tokens.

    A document's first token is EOT, which as a target ends the document before it: the stream is
    [EOT] + tokens for each document, and one EOT closes the last. With a BOS each document is
    [BOS] + tokens + [EOT], and a BOS is never a target. Either way the targets are the tokens of
    the documents and one EOT each.

    Windows start every N tokens, so that neighbours share one token and every token but the
    stream's first is at a target's place exactly once. Segment ids number the documents within a
    window from 1; a number that is skipped says that the segment's first token is no target. The
    last window is filled up with EOT of segment 0, which is never a target (`target_mask`).

    Attributes:
      targets: targets so far.
      documents: documents so far.
    """

    def __init__(self, context: int, eot_id: int, bos_id: int | None = None):
        """Windows of `context` + 1 tokens, of documents that start with `bos_id` or `eot_id`."""
        self.targets = 0
        self.documents = 0
        self._context = context
        self._eot = np.array([eot_id], np.int32)
        self._bos = None if bos_id is None else np.array([bos_id], np.int32)
        self._length = 0  # tokens so far
        self._tokens = [np.empty(0, np.int32)]
        self._owners = [np.empty(0, np.int64)]  # of each token the number of its document

    def start_document(self) -> None:
        """Ends the document before, if any, and starts the next."""
        if self.documents:
            self.targets += 1
            if self._bos is not None:
                self._append(self._eot, self._owner)
        self.documents += 1
        self._append(self._eot if self._bos is None else self._bos, self._owner)

    @property
    def _owner(self) -> int:
        """Number of the document, one apart where its first token is a target, else two."""
        return self.documents if self._bos is None else 2 * self.documents

    def add(self, ids: np.ndarray) -> None:
        """Adds ids [T] to the document."""
        self.targets += len(ids)
        self._append(ids, self._owner)

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Removes the windows that are complete: tokens int32 and segment ids int64 [W, N+1]."""
        tokens, owners = np.concatenate(self._tokens), np.concatenate(self._owners)
        windows = max(0, len(tokens) - 1) // self._context
        taken = windows * self._context
        self._tokens, self._owners = [tokens[taken:]], [owners[taken:]]
        index = np.arange(windows)[:, None] * self._context + np.arange(self._context + 1)
        tokens, owners = tokens[index], owners[index]
        return tokens, np.where(owners > 0, owners - owners[:, :1] + 1, 0)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Closes the stream and removes all windows that are left, the last one padded."""
        self.targets += 1
        self._append(self._eot, self._owner + (self._bos is None))
        padding = (1 - self._length) % self._context
        self._append(np.repeat(self._eot, padding), 0)
        return self.take()

    def _append(self, ids: np.ndarray, owner: int) -> None:
        self._length += len(ids)
        self._tokens.append(ids)
        self._owners.append(np.full(len(ids), owner))


def target_mask(segment_ids: np.ndarray) -> np.ndarray:
    """Return which targets count: bool [B, N] for segment ids [B, N+1] (numpy or JAX).

    All but padding and the BOS of a document, before which a number is skipped. The EOT after a
    document counts: it says that the document ends here.
    """
    targets = segment_ids[:, 1:]
    return (targets != 0) & (targets - segment_ids[:, :-1] < 2)
