"""Errors of native libraries as one ValueError with one message."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from flowhn_jax.utils.text import one_line

_Item = TypeVar("_Item")
_NOT_ERRORS = (KeyboardInterrupt, SystemExit, GeneratorExit)
_stderr_lock = threading.Lock()


@contextlib.contextmanager
def errors_as_value_error(what: str) -> Iterator[None]:
    """Turn whatever a native library raises into a ValueError: `what`, a colon, the reason.

    A panic in a Rust library is a BaseException whose class cannot be imported.
    """
    try:
        yield
    except _NOT_ERRORS:
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {_reason(error)}.") from error


def iterate(items: Iterable[_Item], what: str) -> Iterator[_Item]:
    """Yield the items of a native library's iterable, with `errors_as_value_error`."""
    with errors_as_value_error(what):
        iterator = iter(items)
    while True:
        with errors_as_value_error(what):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextlib.contextmanager
def hide_panic_output() -> Iterator[None]:
    """Drop what the process writes to stderr if the body raises; otherwise write it afterwards.

    Rust prints a panic and its backtrace before Python sees the exception.
    """
    if not hasattr(os, "memfd_create"):  # only Linux has it
        yield
        return
    with _stderr_lock, contextlib.ExitStack() as stack:
        try:
            stderr = os.dup(2)
        except OSError:  # the process has no stderr
            yield
            return
        stack.callback(os.close, stderr)
        captured = os.memfd_create("stderr")
        stack.callback(os.close, captured)
        os.dup2(captured, 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
        os.lseek(captured, 0, os.SEEK_SET)
        while text := os.read(captured, 1 << 16):
            os.write(stderr, text)


def _reason(error: BaseException) -> str:
    return one_line(error).rstrip(".") or type(error).__name__
