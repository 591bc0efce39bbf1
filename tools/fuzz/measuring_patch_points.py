"""Patches that stop a fuzzed measurement after its inputs, before compiling and timing.

Each `for_...` function is called in the child process and replaces functions there.
"""

import contextlib
import itertools
import sys
import types
from typing import Any

from flowhn_jax.aot import step_report
from flowhn_jax.aot.step_memory import Memory, shard_bytes
from flowhn_jax.aot.step_plan import Plan
from flowhn_jax.bench import branch_parallel, branch_times, checkpoint_cost, decode, kernel_times
from flowhn_jax.bench.device import MeasuredRates
from flowhn_jax.bench.suite import document
from flowhn_jax.bench.suite.supervisor import Supervisor
from flowhn_jax.compare import speed, training_data
from flowhn_jax.config import Config
from flowhn_jax.data import packages_corpus
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.report import plots
from flowhn_jax.training import runs
from tools.fuzz.measured import CODE
from tools.fuzz.patch_points import replace, replace_corpus, with_replaced

with contextlib.suppress(ImportError):  # imported once for all children
    plots.load_pyplot()


def _memory(program: None, state: Any, batch: Any, data: int, code: int) -> Memory:
    rows = shard_bytes(batch)
    return Memory(data, data, rows, 10_000 * rows, rows, code)


def for_aot() -> None:
    """Let `aot` neither trace nor compile."""
    replace(
        step_report,
        lower_train_step=lambda *_: None,
        plan=lambda *_: Plan("", 2**30),
        _compile=lambda lowered: ("", 2**30, 2**20),
        Program=lambda text: None,
        memory=_memory,
        traffic=lambda *_: {},
    )


def for_compare() -> None:
    """Let every program of `compare` take a second, and training no time."""
    replace_corpus()
    seconds = {"train": [1.0], "prefill": [1.0], "decode": [1.0]}
    compiled = types.SimpleNamespace(compile_seconds=1.0, memory_bytes=2**20, kernels="xla")
    replace(speed, compile_programs=lambda *_: compiled, time_programs=lambda *_: seconds)
    replace(training_data, package_documents=packages_corpus.package_documents)
    replace(training_data, _RECALL_DOCUMENTS=20)
    replace(runs, fit=lambda config, folder, advance: advance() is None)


def _bench_checkpoint(config: Config, *, repeats: int, out: str) -> None:
    make_mesh(config.mesh, config.train.batch_size)
    with open(out, "w") as file:
        file.write("{}")


def for_bench() -> None:
    """Let every timed function of `bench` take a second; run neither the suite nor PyTorch."""
    branch = types.SimpleNamespace(attention=None, ssm=None)
    one_block = types.SimpleNamespace(blocks=[branch])
    ticks = itertools.count(1)
    replace(
        branch_times,
        models=with_replaced(branch_times.models, build=lambda model: one_block),
        _seconds=lambda *_: float(next(ticks)),
    )
    replace(checkpoint_cost, bench_checkpoint=_bench_checkpoint)
    decoding_models = with_replaced(
        decode.models, init=lambda *_: None, for_inference=lambda model, params: params
    )
    replace(
        decode,
        models=decoding_models,
        _seconds_per_step=lambda *_: 1.0,
        _with_cache=lambda *_: (1.0, [1]),
        _recomputing=lambda *_: (1.0, [1]),
    )
    replace(
        kernel_times,
        measure_rates=lambda dtype: MeasuredRates(1e9, 1e12, 1e9),
        cases_lib=with_replaced(kernel_times.cases_lib, cases=lambda *_: ()),
    )
    replace(branch_parallel, _block=lambda *_: (lambda: None, [1.0]))
    replace(Supervisor, run=lambda self: None)
    replace(document, code_hash=lambda: CODE)
    sys.modules["torch"] = None  # type: ignore[assignment]
