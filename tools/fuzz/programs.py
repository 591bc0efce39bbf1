"""Commands as functions, for a child process that has imported their modules."""

import runpy
import sys
from collections.abc import Callable
from typing import Any

from flowhn_jax.utils.sources import ROOT


def script(name: str, patch: Callable[[], None] = lambda: None) -> Callable[[], Any]:
    """Return a function that applies `patch` and runs a script of the repository's root."""

    def program() -> None:
        patch()
        runpy.run_path(str(ROOT / name), run_name="__main__")

    return program


def module(name: str, patch: Callable[[], None] = lambda: None) -> Callable[[], Any]:
    """Return a function that applies `patch` and runs `python -m name`."""

    def program() -> None:
        patch()
        sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return program
