"""Reading ahead: whether the next items can be read is known before they are needed."""

import collections
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Ahead(Iterator[Item]):
    """The same items; an error is raised after the last item that was read before it."""

    def __init__(self, items: Iterator[Item]):
        self._items = items
        self._read: collections.deque[Item] = collections.deque()
        self._error: Exception | None = None  # of the iterator, StopIteration included

    def __next__(self) -> Item:
        self._read_ahead(1)
        if not self._read:
            raise self._error
        return self._read.popleft()

    def error_within(self, count: int) -> Exception | None:
        """Return the error that prevents one of the next `count` items; None: they were read.

        The end of the items is no error.
        """
        self._read_ahead(count)
        is_error = len(self._read) < count and not isinstance(self._error, StopIteration)
        return self._error if is_error else None

    def forget(self) -> None:
        """Read again from where the iterator is by now."""
        self._read.clear()
        self._error = None

    def _read_ahead(self, count: int) -> None:
        while len(self._read) < count and self._error is None:
            try:
                self._read.append(next(self._items))
            except Exception as error:
                self._error = error
