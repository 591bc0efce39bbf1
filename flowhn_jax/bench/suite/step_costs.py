"""Part `step_costs`: the ten largest costs of one train step of FlowHN, by source line."""

import dataclasses
import functools
from collections.abc import Iterator

import jax

from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.step_profile import largest, profile
from flowhn_jax.bench.suite.workload import Earlier, recipe, sizes, trained_at
from flowhn_jax.bench.throughput import TrainRun, compile_programs
from flowhn_jax.config import Config
from flowhn_jax.parallel.mesh import make_mesh

_STRATEGY = "fac_split"
_COUNT = 10


def plan() -> list[str]:
    """Return SIZE/fac_split of the first two sizes."""
    return [f"{size}/{_STRATEGY}" for size in sizes()[:2]]


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield the rows, at the batch sizes of part `training`."""
    name = "jax_compilation_cache_include_metadata_in_key"
    # Otherwise a program whose source only moved would come out of the cache with its old lines.
    jax.config.update(name, True)
    try:
        for key in missing:
            config = trained_at(recipe(*key.split("/")), key, earlier)
            labels = {"key": key, "batch_size": config.train.batch_size}
            yield attempt(labels, functools.partial(_profile, config))
    finally:
        jax.config.update(name, False)


def _profile(config: Config) -> Row:
    mesh = make_mesh(config.mesh, config.train.batch_size)
    programs = compile_programs(config, mesh)
    costs = profile(TrainRun(programs), programs.train_step.as_text() or "")
    return {
        "costs": [dataclasses.asdict(cost) for cost in largest(costs, _COUNT)],
        "seconds": sum(cost.seconds for cost in costs),
    }
