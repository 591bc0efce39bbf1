"""Work that a background thread repeats."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeating(
    function: Callable[[], bool], seconds: float, name: str, *, joins: bool = False
) -> Iterator[None]:
    """Call a function in a daemon thread at intervals, until it returns False or the context ends.

    Args:
      function: returns whether to call it again.
      seconds: from the end of a call to the next one, and from the beginning to the first.
      name: the name of the thread.
      joins: whether the context ends only after the call that is under way. Without it a function
        that waits for the network does not delay the end.
    """
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(seconds) and function():
            pass

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        if joins:
            thread.join()
