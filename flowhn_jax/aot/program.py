"""A train step for TPUs as XLA plans it, without its machine code.

The program, its schedule and its memory stand early; the code that is made of them takes most of
the time. XLA has no switch to end there, but it can write down what it has: a process of its own
compiles, and is ended when both are written.
"""

import multiprocessing
import pathlib
import re
import tempfile
import time
from typing import NamedTuple

from flowhn_jax.aot.topology import GIB, describe
from flowhn_jax.config import Config
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training.step import lower_train_step
from kernels import backends

# Allowed for the machine code: that of the largest models here takes 0.24 to 0.43 GiB.
CODE = GIB // 2

_PROGRAM = "*after_optimizations_after_buffer_assignment.txt"
_MEMORY = "*after_optimizations-memory-usage-report.txt"
_ERROR = "error"


class Plan(NamedTuple):
    """What XLA has written."""

    text: str  # of the program, scheduled
    main_memory: int  # bytes of its arguments, results and temporaries


def plan(config: Config, topology: str, slices: int) -> Plan:
    """The plan of a config's train step for a topology of TPUs.

    Raises:
      RuntimeError: XLA cannot compile it; its words, as that it does not fit.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        process = multiprocessing.get_context("spawn").Process(
            target=_compile, args=(config, topology, slices, name), daemon=True
        )
        process.start()
        try:
            while (found := _read(folder)) is None and process.is_alive():
                time.sleep(0.2)
        finally:
            process.kill()
            process.join()
        found = found or _read(folder)
        if found is not None:
            return found
        error = folder / _ERROR
        raise RuntimeError(error.read_text() if error.exists() else "XLA has written no plan.")


def _compile(config: Config, topology: str, slices: int, folder: str) -> None:
    try:
        mesh = make_mesh(config.mesh, eval_batch_size(config), describe(topology, slices).devices)
        with backends.use(config.kernels.backend):
            lowered = lower_train_step(config, mesh)
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    except Exception as error:
        (pathlib.Path(folder) / _ERROR).write_text(str(error))


def _read(folder: pathlib.Path) -> Plan | None:
    """What is written; None where it is not yet all there."""
    programs, reports = sorted(folder.glob(_PROGRAM)), sorted(folder.glob(_MEMORY))
    if not programs or not reports:
        return None
    text = programs[-1].read_text()
    total = re.search(r"\(color=0\)\s+Total bytes: (\d+)", reports[-1].read_text())
    if total is None or "\nENTRY " not in text or not text.rstrip(" \n").endswith("\n}"):
        return None  # the outermost computation is the last one
    return Plan(text, int(total[1]))
