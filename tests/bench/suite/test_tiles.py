"""Part `tiles` without a GPU: what it would time."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

import kernels.selective_scan
import kernels.ssd
from flowhn_jax import models
from flowhn_jax.bench.suite import tiles
from flowhn_jax.bench.suite.workload import recipe
from kernels.backends import Backend, Operation

# By operation: its module, its backend on a CPU, and a model with it.
SCANS = {
    "selective_scan": (kernels.selective_scan, "xla_sequential", "no_split"),
    "ssd": (kernels.ssd, "xla", "mamba2"),
}


def types(inputs):
    return [None if x is None else (x.shape, x.dtype) for x in inputs]


@pytest.mark.parametrize("size", ["135m", "1b"])
@pytest.mark.parametrize("operation", SCANS)
def test_inputs_are_those_of_training(monkeypatch, operation, size):
    """As the scan gets them while one block of the recipe is traced in bfloat16."""
    module, backend, name = SCANS[operation]
    run, traced = module.OPERATION.backends[backend].run, []

    def record(inputs):
        traced.append(types(inputs))
        return run(inputs)

    recorder = Operation(operation, {backend: Backend(record)}, {"cpu": (backend,)})
    monkeypatch.setattr(module, "OPERATION", recorder)
    model = dataclasses.replace(recipe(size, name).model, dtype="bfloat16", blocks=1)
    expected = tiles.inputs(f"{operation}/{size}/1024")
    tokens = jax.ShapeDtypeStruct(expected.segment_ids.shape, jnp.int32)
    jax.eval_shape(
        lambda params, tokens: models.forward(model, params, tokens, segment_ids=tokens),
        models.abstract_params(model),
        tokens,
    )
    assert traced == [types(expected)]


def test_only_gpus_with_triton_are_planned_for(monkeypatch):
    assert tiles.plan() == []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert sorted(tiles.plan()) == [
        f"{operation}/{shape}"
        for operation in ("selective_scan", "ssd")
        for shape in ("135m/1024", "135m/8192", "1b/1024")
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "jax_triton" or None)
    assert tiles.plan() == []


def test_every_tile_is_timed_forward_and_backward(monkeypatch):
    """Through jax-triton, as far as a machine without a GPU goes: to the shapes."""
    pytest.importorskip("jax_triton", exc_type=ImportError)

    def trace(entry, candidates, program, arguments):
        for tile in candidates:
            gradients = jax.eval_shape(program(tile), *arguments)
            floats = [x.shape for x in arguments if jnp.issubdtype(x.dtype, jnp.floating)]
            assert [x.shape for x in gradients] == floats
        return {tile: float(len(entry) + sum(tile)) for tile in candidates}

    monkeypatch.setattr(tiles, "time_tiles", trace)
    scan, ssd = tiles.measure(["selective_scan/1b/1024", "ssd/135m/8192"], {})
    assert scan["shape"] == "[8, 1024, 4096]"
    assert scan["default"] in scan["seconds"]
    assert len(scan["seconds"]) == 6
    assert ssd == {
        "key": "ssd/135m/8192",
        "shape": "[2, 8192, 24, 64]",
        "seconds": {"64 x 8": 85.0, "64 x 4": 81.0},
        "default": "64 x 8",
    }


def test_a_row_without_a_tile_that_runs_has_a_message(monkeypatch):
    monkeypatch.setattr(tiles, "time_tiles", lambda *_: {})
    (row,) = tiles.measure(["ssd/1b/1024"], {})
    assert row == {
        "key": "ssd/1b/1024",
        "failed": "RuntimeError: no tile runs; suite.log has the messages",
    }
