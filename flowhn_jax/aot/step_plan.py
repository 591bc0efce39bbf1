"""XLA's plan of a train step: the scheduled program and its memory, without machine code.

XLA schedules the program and its memory early; generating machine code takes most of the time. It
has no option to stop before that, but it can dump intermediate results: a separate process
compiles, and is killed as soon as both dumps are complete.
"""

import itertools
import multiprocessing
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import NamedTuple

from flowhn_jax.aot.topology import GIB, describe
from flowhn_jax.config import Config
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training.step import lower_train_step
from kernels import backends

# Allowance for machine code, which takes 0.24 to 0.43 GiB for the largest recipes.
CODE_BYTES = GIB // 2

# Of TPUs and of GPUs.
_PROGRAMS = "*after_optimizations_after_buffer_assignment.txt", "*gpu_after_optimizations.txt"
_MEMORY = "*after_optimizations-memory-usage-report.txt"
_ERROR = "error"


class Plan(NamedTuple):
    """A scheduled program and its memory, as dumped by XLA."""

    text: str  # of the scheduled program
    main_memory: int  # bytes of arguments, results and temporaries


def plan(
    config: Config, topology: str, slices: int, options: Mapping[str, str] | None = None
) -> Plan:
    """Return the plan of a config's train step for a topology.

    Args:
      config: the config of the run; its mesh is laid over the topology's devices.
      topology: name of the machine.
      slices: number of TPU slices.
      options: XLA's compiler options, next to those of the train step.

    Raises:
      RuntimeError: XLA cannot compile the step, e.g. because it does not fit; its message.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        process = multiprocessing.get_context("spawn").Process(
            target=_compile, args=(config, topology, slices, options, name), daemon=True
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
        raise RuntimeError(error.read_text() if error.exists() else "XLA ended without a plan.")


def _compile(
    config: Config, topology: str, slices: int, options: Mapping[str, str] | None, folder: str
) -> None:
    try:
        mesh = make_mesh(config.mesh, eval_batch_size(config), describe(topology, slices).devices)
        with backends.use(config.kernels.backend):
            lowered = lower_train_step(config, mesh)
        dumps = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        lowered.compile(compiler_options={**(options or {}), **dumps})
    except Exception as error:
        (pathlib.Path(folder) / _ERROR).write_text(str(error))


def _read(folder: pathlib.Path) -> Plan | None:
    """Return the plan in a folder of dumps; None if it is not complete yet."""
    programs = sorted(itertools.chain.from_iterable(map(folder.glob, _PROGRAMS)))
    reports = sorted(folder.glob(_MEMORY))
    if not programs or not reports:
        return None
    text = programs[-1].read_text()
    total = re.search(r"\(color=0\)\s+Total bytes: (\d+)", reports[-1].read_text())
    if total is None or "\nENTRY " not in text or not text.rstrip(" \n").endswith("\n}"):
        return None  # the entry computation comes last
    return Plan(text, int(total[1]))
