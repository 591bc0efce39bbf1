"""Part `compilation`: on a CPU, the train steps compiled into the cache ahead of `training`.

What makes a CPU's steps quick, one arena for the memory of all threads (`host_memory`), makes
compiling in several threads slow. So a process without it compiles, and the one that measures finds
the programs in the cache. On accelerators `training` compiles on its own.
"""

import functools
from collections.abc import Iterator

from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.suite import training
from flowhn_jax.bench.suite.workload import Earlier, compile_pool, recipe
from kernels.backends import target_platform


def plan() -> list[str]:
    """Return the keys of `training` on a CPU, none elsewhere."""
    return training.plan() if target_platform() == "cpu" else []


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield the rows: seconds that compiling took with several programs at the same time."""
    rate = training.product_rate(earlier)
    with compile_pool() as pool:
        compiled = {
            key: pool.submit(attempt, {"key": key}, functools.partial(_compile, key, rate))
            for key in missing
        }
        for row in compiled.values():
            yield row.result()


def _compile(key: str, rate: float) -> Row:
    found = training.compile_largest(recipe(*key.split("/")), training.memory_limit(), rate)
    seconds = found.programs.compile_seconds
    return {"compile_seconds": seconds, "summary": f"{seconds:.1f} s"}
