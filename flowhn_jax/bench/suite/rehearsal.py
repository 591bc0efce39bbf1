"""`bench suite --topology=...`: the suite's programs compiled for a device that is absent.

Nothing runs. A program that does not compile here would fail on the device too.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flowhn_jax import flops, models
from flowhn_jax.aot.topology import Topology
from flowhn_jax.aot.topology import describe as describe_topology
from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.suite import accuracy, learning, machine, training_speed
from flowhn_jax.bench.suite.parts import Part
from flowhn_jax.bench.suite.workload import MODELS, Earlier, recipe, sizes
from flowhn_jax.bench.throughput import compile_programs, program_bytes
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.parallel.rules import with_shardings
from flowhn_jax.utils.timing import compile_timed
from kernels import backends

_TOPOLOGY = "FLOWHN_SUITE_TOPOLOGY"  # variable of the worker's environment
_PRODUCT_SHARE = 0.7  # of the peak, assumed of matrix products
_USABLE = 0.86  # of the chip's memory: 0.92 of the worker times 0.94 of part `training`


def part(topology: str) -> Part:
    """Return the one part of a rehearsal for a topology, such as 'gpu:h100x1'."""
    environment = {
        _TOPOLOGY: topology,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no CUDA is installed
    }
    return Part("rehearsal", f"Programs for {topology}", __name__, 1.0, environment=environment)


def describe() -> Row:
    """Return the target and the packages that compile for it."""
    target = _target()
    packages = machine.describe()["packages"]
    return {"device": target.name, "devices": len(target.devices), "packages": packages}


def plan() -> list[str]:
    """Return training/SIZE/MODEL, accuracy/CHECK, inference/SIZE/MODEL and learning/DTYPE."""
    with jax.set_mesh(_mesh()):
        steps = [f"training/{key}" for key in training_speed.plan()]
        first = [key for key in steps if key.split("/")[1] == sizes()[0]]
        return [
            *first,
            *(f"accuracy/{key}" for key in accuracy.plan()),
            *(f"inference/{sizes()[0]}/{model}" for model in MODELS),
            "learning/float32",
            *steps[len(first) :],
        ]


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield the rows: compile seconds, bytes of the device's memory, kernels."""
    # Programs for the target could not be loaded here.
    jax.config.update("jax_enable_compilation_cache", False)
    for key in missing:
        kind, _, rest = key.partition("/")
        row = attempt({"key": key}, functools.partial(_COMPILE[kind], rest))
        if "seconds" in row:
            row["summary"] = f"{row['seconds']:.1f} s, {row['memory_bytes'] / 2**30:.2f} GiB"
        yield row


def _target() -> Topology:
    return describe_topology(os.environ[_TOPOLOGY])


def _mesh() -> Mesh:
    return make_mesh(recipe("tiny", "fac_split").mesh, 0, _target().devices[:1])


def _training(key: str) -> Row:
    size, _, model = key.partition("/")
    target = _target()
    rate = _PRODUCT_SHARE * (flops.peak_flops(target.devices[0]) or 1e14)
    memory = int(_USABLE * target.chip.memory)
    devices = target.devices[:1]
    try:
        found = training_speed.compile_largest(recipe(size, model), memory, rate, devices)
    except training_speed.TooLargeError as error:  # a result, not a failure
        return {"seconds": 0.0, "memory_bytes": error.needed, "fits": False}
    programs = found.programs
    return {
        "batch_size": found.config.train.batch_size,
        "batch_limit": found.limit,
        "seconds": programs.compile_seconds,
        "memory_bytes": programs.memory_bytes,
        "fits": True,
        "kernels": programs.kernels,
    }


def _accuracy(key: str) -> Row:
    mesh = _mesh()
    with jax.set_mesh(mesh), backends.record() as chosen:
        try:
            program = accuracy.lowered(key, functools.partial(_on, mesh))[1]
        except backends.CannotServeError as error:
            return accuracy.unserved(error)
        return _compile(program) | {"kernels": backends.describe(chosen)}


def _inference(key: str) -> Row:
    size, _, name = key.partition("/")
    config, mesh = recipe(size, name), _mesh()
    model, batch = config.model, config.train.batch_size
    with jax.set_mesh(mesh), backends.record() as chosen:
        # As models.for_inference casts them.
        params = with_shardings(_for_inference(model), mesh)
        tokens = _on(mesh, jax.ShapeDtypeStruct((batch, model.context), "int32"))
        prefill = _compile(models.prefill.lower(model, params, tokens))
        cache = jax.eval_shape(lambda p: models.init_cache(model, p, batch, model.context), params)
        last = _on(mesh, jax.ShapeDtypeStruct((batch,), "int32"))
        step = _compile(models.step.lower(model, params, last, _on(mesh, cache)))
    return {
        "batch_size": batch,
        "seconds": prefill["seconds"] + step["seconds"],
        "memory_bytes": max(prefill["memory_bytes"], step["memory_bytes"]),
        "kernels": backends.describe(chosen),
    }


def _for_inference(model: Any) -> Any:
    params = models.abstract_params(model)
    return jax.eval_shape(lambda p: models.for_inference(model, p), params)


def _learning(dtype: str) -> Row:
    with jax.set_mesh(_mesh()):
        config = learning.config_of(dtype)
    mesh = make_mesh(config.mesh, config.train.batch_size, _target().devices[:1])
    programs = compile_programs(config, mesh)
    return {
        "batch_size": config.train.batch_size,
        "seconds": programs.compile_seconds,
        "memory_bytes": programs.memory_bytes,
        "kernels": programs.kernels,
    }


def _compile(lowered: jax.stages.Lowered) -> Row:
    compiled, seconds = compile_timed(lowered)
    return {"seconds": seconds, "memory_bytes": program_bytes(compiled)}


def _on(mesh: Mesh, tree: Any) -> Any:
    """Return the shapes and dtypes of a tree, replicated over a mesh."""
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


_COMPILE = {
    "training": _training,
    "accuracy": _accuracy,
    "inference": _inference,
    "learning": _learning,
}
