"""Calls into native libraries, whose failures become one message."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from flowhn_jax.utils.text import one_line

_Item = TypeVar("_Item")
_NOT_FAILURES = (KeyboardInterrupt, SystemExit, GeneratorExit)
_stderr_lock = threading.Lock()


@contextlib.contextmanager
def failures_as_value_error(what: str) -> Iterator[None]:
    """Raise ValueError with `what` and the reason for whatever a native library raises.

    A panic of a Rust library is a BaseException, and its class cannot be imported.
    """
    try:
        yield
    except _NOT_FAILURES:
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {_reason(error)}.") from error


def read_all(items: Iterable[_Item], what: str) -> Iterator[_Item]:
    """Yield the items that a native library reads, as of `failures_as_value_error`."""
    with failures_as_value_error(what):
        iterator = iter(items)
    while True:
        with failures_as_value_error(what):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextlib.contextmanager
def panics_unprinted() -> Iterator[None]:
    """Drop what is written to the process's stderr if the body raises; else write it afterwards.

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
