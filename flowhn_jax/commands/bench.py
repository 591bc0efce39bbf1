"""`python -m flowhn_jax.bench suite|kernels|branches|parallel|models|decode|checkpoint`."""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from absl import flags

from flowhn_jax import config as config_lib
from flowhn_jax import recipes
from flowhn_jax.aot import topology
from flowhn_jax.bench import (
    branch_parallel,
    branch_times,
    cases,
    checkpoint_cost,
    decode,
    kernel_times,
    peer_models,
)
from flowhn_jax.bench.suite import command as suite
from flowhn_jax.bench.suite import rehearsal, side_by_side
from flowhn_jax.commands import flags as cli
from flowhn_jax.utils.text import short_repr
from kernels import backends
from kernels.operations import OPERATIONS

_OPERATIONS = flags.DEFINE_multi_enum(
    "operation", [], cases.OPERATION_NAMES, "kernels: these alone; all without it."
)
_SIZES = flags.DEFINE_multi_enum(
    "size", [], cases.SIZES, "kernels: shapes; on a CPU small and 135m without it, else all."
)
_BACKENDS = flags.DEFINE_multi_enum(
    "backend",
    [],
    sorted({backends.XLA, *(name for op in OPERATIONS.values() for name in op.backends)}),
    "kernels: these alone; all that the platform has without it.",
)
_MAX_TOKENS = 2**24
_LENGTHS = flags.DEFINE_multi_integer(
    "length",
    [],
    "kernels: sequence lengths; 1024, and not on a CPU 2048, 8192 and 32768.",
    lower_bound=1,
    upper_bound=_MAX_TOKENS,
)
_TOKENS = flags.DEFINE_integer(
    "tokens",
    None,
    "kernels: tokens of a batch; 1024 on a CPU, else 32768.",
    lower_bound=1,
    upper_bound=_MAX_TOKENS,
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "kernels: float32 on a CPU, else bfloat16."
)
_PEERS = flags.DEFINE_bool("peers", False, "kernels: measure installed peers beside ours.")
_REPEATS = flags.DEFINE_integer(
    "repeats", 20, "Timed calls, median taken.", lower_bound=1, upper_bound=10_000
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "JSON file to write; bench_COMMAND.json without it. suite: folder; runs/suite without it, or "
    "suite_comparison with --compare.",
)
_MINUTES = flags.DEFINE_float("minutes", 8, "suite: time to measure at the most.", 0.05, 1440)
_COMPARE = flags.DEFINE_bool(
    "compare", False, "suite: set the results of two folders, A and B, side by side."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "suite: compile its programs, such as for gpu:h100x1 or v5e:1x1; run none."
)
_CONFIG = cli.define_config(required=False)


def _kernels() -> None:
    if _PEERS.value:  # leave them their share of a GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    is_cpu = jax.default_backend() == "cpu"
    kernel_times.bench_kernels(
        _OPERATIONS.value or cases.OPERATION_NAMES,
        _SIZES.value or (("small", "135m") if is_cpu else cases.SIZES),
        _LENGTHS.value or ((1024,) if is_cpu else (1024, 2048, 8192, 32768)),
        _BACKENDS.value,
        tokens=_TOKENS.value or (1024 if is_cpu else 32768),
        dtype=_DTYPE.value or ("float32" if is_cpu else "bfloat16"),
        repeats=_REPEATS.value,
        with_peers=_PEERS.value,
        out=_OUT.value or "bench_kernels.json",
    )


def _suite(*folders: str) -> None:
    if folders and not _COMPARE.value:
        raise ValueError(
            f"Unexpected argument {short_repr(folders[0])}; to compare: suite --compare A B."
        )
    if _COMPARE.value:
        if len(folders) != 2:
            raise ValueError(
                f"--compare takes two folders, as in --compare A B; got {len(folders)}."
            )
        side_by_side.compare(*folders, _OUT.value or "suite_comparison")
        return
    if _TOPOLOGY.value is not None:
        topology.describe(_TOPOLOGY.value)  # an unknown one ends here
        parts, out = (rehearsal.part(_TOPOLOGY.value),), _OUT.value or "runs/rehearsal"
        ok = suite.run_suite(out, _MINUTES.value, parts, rehearsal.__name__)
    else:
        ok = suite.run_suite(_OUT.value or "runs/suite", _MINUTES.value)
    if not ok:
        sys.exit(1)


def _models() -> None:
    peer_models.bench_models(repeats=_REPEATS.value, out=_OUT.value or "bench_models.json")


def _checkpoint() -> None:
    given = _CONFIG.value is not None
    config = cli.parse_config(_CONFIG) if given else config_lib.parse(recipes.load("flowhn_tiny"))
    checkpoint_cost.bench_checkpoint(
        config, repeats=_REPEATS.value, out=_OUT.value or "bench_checkpoint.json"
    )


def _of_config(name: str, bench: Callable[..., Any]) -> None:
    if _CONFIG.value is None:
        raise ValueError(f"bench {name} needs --config, the recipe of what it measures.")
    config = cli.parse_config(_CONFIG)
    bench(config, repeats=_REPEATS.value, out=_OUT.value or f"bench_{name}.json")


def run() -> None:
    """Parse the flags and run the command."""
    commands = {
        "branches": branch_times.bench_branches,
        "parallel": branch_parallel.bench_parallel,
        "decode": decode.bench_decode,
    }
    cli.run(
        {"suite": _suite, "kernels": _kernels, "models": _models, "checkpoint": _checkpoint}
        | {name: partial(_of_config, name, bench) for name, bench in commands.items()},
        arguments={"suite": 2},
    )
