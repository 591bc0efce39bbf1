"""The command lines as functions, for a child process that has imported their modules."""

import runpy
import sys
from collections.abc import Callable
from typing import Any

from flowhn_jax.utils.sources import ROOT


def script(name: str, seam: Callable[[], None] = lambda: None) -> Callable[[], Any]:
    """train.py or eval.py, up to the `seam`."""

    def program() -> None:
        seam()
        runpy.run_path(str(ROOT / name), run_name="__main__")

    return program


def module(name: str, seam: Callable[[], None] = lambda: None) -> Callable[[], Any]:
    """`python -m name`, up to the `seam`."""

    def program() -> None:
        seam()
        sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return program
