"""Where a fuzzed measurement stops: after its inputs, before the minutes of compiling and timing.

Each function is called in the child, whose modules it changes.
"""

import contextlib
import itertools
import sys
import types
from typing import Any

from flowhn_jax.aot import step_report as report
from flowhn_jax.aot.step_memory import Memory, shard_bytes
from flowhn_jax.aot.tpu_plan import Plan
from flowhn_jax.bench import branch_parallel as parallel
from flowhn_jax.bench import branch_times as branches
from flowhn_jax.bench import checkpoint_cost as checkpoint
from flowhn_jax.bench import decode
from flowhn_jax.bench import kernel_times as kernels
from flowhn_jax.bench.device import Rates
from flowhn_jax.bench.suite import document
from flowhn_jax.bench.suite.supervisor import Supervisor
from flowhn_jax.compare import comparison as run
from flowhn_jax.compare import speed
from flowhn_jax.config import Config
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.report import plots
from tools.fuzz.measured import CODE
from tools.fuzz.seams import without_the_corpus

with contextlib.suppress(ImportError):  # imported once for all children
    plots.load_pyplot()


def _memory(program: None, state: Any, batch: Any, data: int, code: int) -> Memory:
    rows = shard_bytes(batch)
    return Memory(data, data, rows, 10_000 * rows, rows, code)


def for_aot() -> None:
    """Nothing is traced and compiled."""
    report.lower_train_step = lambda *_: None
    report.plan = lambda *_: Plan("", 2**30)
    report._compile = lambda lowered: ("", 2**30, 2**20)
    report.Program = lambda text: None
    report.memory = _memory
    report.traffic = lambda *_: {}


def for_compare() -> None:
    """Programs take a second each, and training none."""
    without_the_corpus()
    seconds = {"train": [1.0], "prefill": [1.0], "decode": [1.0]}
    compiled = types.SimpleNamespace(compile_seconds=1.0, memory_bytes=2**20, kernels="xla")
    speed.compile_programs = lambda *_: compiled
    speed.time_programs = lambda *_: seconds
    run.fit = lambda config, folder, advance: advance() is None


def _bench_checkpoint(config: Config, *, repeats: int, out: str) -> None:
    make_mesh(config.mesh, config.train.batch_size)
    with open(out, "w") as file:
        file.write("{}")


def for_bench() -> None:
    """Functions take a second each; no part of the suite runs, nor does PyTorch."""
    branch = types.SimpleNamespace(attention=None, ssm=None)
    one_block = types.SimpleNamespace(blocks=[branch])
    ticks = itertools.count(1)
    branches.models = _with(branches.models, build=lambda model: one_block)
    branches._seconds = lambda *_: float(next(ticks))
    checkpoint.bench_checkpoint = _bench_checkpoint
    decode.models = _with(
        decode.models, init=lambda *_: None, for_inference=lambda model, params: params
    )
    decode._seconds_per_step = lambda *_: 1.0
    decode._with_cache = decode._recomputing = lambda *_: (1.0, [1])
    kernels.measure_rates = lambda dtype: Rates(1e9, 1e12, 1e9)
    kernels.cases_lib = _with(kernels.cases_lib, cases=lambda *_: ())
    parallel._block = lambda *_: (lambda: None, [1.0])
    Supervisor.run = lambda self: None
    document.code_hash = lambda: CODE
    sys.modules["torch"] = None


def _with(module: Any, **changes: Any) -> types.SimpleNamespace:
    """Return what a module has, with other functions under some names."""
    return types.SimpleNamespace(**vars(module) | changes)
