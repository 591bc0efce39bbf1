"""Part `compilation`: on a CPU, compiles the train steps into the cache before part `training`.

One memory arena for all threads (`utils.memory`) makes a CPU's train steps fast, but slows down
compiling in several threads. So a process without it compiles, and the process that measures loads
the programs from the cache. On accelerators part `training` compiles them itself.
"""

import functools
from collections.abc import Iterator

from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.suite import training_speed
from flowhn_jax.bench.suite.workload import Earlier, compile_pool, recipe
from kernels.backends import target_platform


def plan() -> list[str]:
    """Return the keys of part `training` on a CPU, none on other platforms."""
    return training_speed.plan() if target_platform() == "cpu" else []


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield the rows: seconds per program, with several programs compiled at the same time."""
    rate = training_speed.product_rate(earlier)
    with compile_pool() as pool:
        compiled = {
            key: pool.submit(attempt, {"key": key}, functools.partial(_compile, key, rate))
            for key in missing
        }
        for row in compiled.values():
            yield row.result()


def _compile(key: str, rate: float) -> Row:
    config, memory = recipe(*key.split("/")), training_speed.memory_limit()
    found = training_speed.compile_largest(config, memory, rate)
    seconds = found.programs.compile_seconds
    return {"compile_seconds": seconds, "summary": f"{seconds:.1f} s"}
