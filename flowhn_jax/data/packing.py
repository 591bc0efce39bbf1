"""Packing: documents of any length into windows of one length, with nothing lost and no gaps."""

import numpy as np


class Packer:
    """Cuts a stream of documents into windows of N+1 tokens.

    In the stream every document is [EOT] + its tokens, and one EOT closes the last. Windows start
    every N tokens, so that neighbours share one token and every token but the stream's first is a
    target exactly once; the target of a document's last token is EOT. Segment ids number the
    documents within a window from 1. The last window is filled up with EOT of segment 0, which is
    never a target (`target_mask`).

    Attributes:
      targets: tokens of the stream so far, less its first.
      documents: documents so far.
    """

    def __init__(self, context: int, eot_id: int):
        """Windows of `context` + 1 tokens, of documents that start with `eot_id`."""
        self.targets = -1
        self.documents = 0
        self._context = context
        self._eot = np.array([eot_id], np.int32)
        self._tokens = [np.empty(0, np.int32)]
        self._owners = [np.empty(0, np.int64)]  # of each token the number of its document

    def start_document(self) -> None:
        """Ends the document before, if any, and starts the next."""
        self.documents += 1
        self.add(self._eot)

    def add(self, ids: np.ndarray) -> None:
        """Adds ids [T] to the document."""
        self.targets += len(ids)
        self._append(ids, self.documents)

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
        self._append(self._eot, self.documents + 1)
        padding = -self.targets % self._context
        self._append(np.repeat(self._eot, padding), 0)
        return self.take()

    def _append(self, ids: np.ndarray, owner: int) -> None:
        self._tokens.append(ids)
        self._owners.append(np.full(len(ids), owner))


def target_mask(segment_ids: np.ndarray) -> np.ndarray:
    """Which targets count: bool [B, N] for segment ids [B, N+1] (numpy or JAX).

    All but padding. The first EOT behind a document counts: it says that the document ends here.
    """
    return segment_ids[:, 1:] != 0
