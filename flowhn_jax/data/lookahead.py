"""Lookahead: reading items before they are needed, to find errors early."""

import collections
import time
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Lookahead(Iterator[Item]):
    """An iterator over the same items, which can report an error before it is reached.

    The error is raised after the last item that was read before it.
    """

    def __init__(self, items: Iterator[Item]):
        self._items = items
        self._read: collections.deque[Item] = collections.deque()
        self._error: Exception | None = None  # of the iterator, StopIteration included
        self._waited = 0.0  # seconds

    def __next__(self) -> Item:
        self._read_ahead(1)
        if not self._read:
            assert self._error is not None
            raise self._error
        return self._read.popleft()

    def error_within(self, count: int) -> Exception | None:
        """Return the error that prevents one of the next `count` items, or None.

        The end of the items is not an error.
        """
        self._read_ahead(count)
        is_error = len(self._read) < count and not isinstance(self._error, StopIteration)
        return self._error if is_error else None

    def clear(self) -> None:
        """Discard what was read ahead, as after the underlying iterator has been moved."""
        self._read.clear()
        self._error = None

    def pop_waited(self) -> float:
        """Return the seconds spent waiting since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _read_ahead(self, count: int) -> None:
        if len(self._read) >= count or self._error is not None:
            return
        start = time.perf_counter()
        while len(self._read) < count and self._error is None:
            try:
                self._read.append(next(self._items))
            except Exception as error:
                self._error = error
        self._waited += time.perf_counter() - start
