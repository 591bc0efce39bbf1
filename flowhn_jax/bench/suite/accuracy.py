"""Part `accuracy`: every operation and backend of this device against float64, at odd shapes.

Values and gradients, in float32 and bfloat16, plain and with documents, states and the other
options. The references are `bench.formulas`, computed on the CPU.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowhn_jax.bench import formulas
from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.kernel_times import backends_of
from flowhn_jax.bench.suite.accuracy_checks import CHECKS, Arrays, Random
from flowhn_jax.bench.suite.workload import Earlier, compile_pool
from kernels.backends import CannotServeError
from kernels.operations import OPERATIONS

# Relative to the largest magnitude of a result: above rounding, far below the error of a wrong
# kernel.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}

_ROUNDED = ("u", "z", "x", "q", "k", "v", "hidden")  # arguments in the compute dtype


def plan() -> list[str]:
    """Return CHECK/BACKEND/DTYPE for each check, backend of this platform and dtype."""
    return [
        f"{check}/{backend}/{dtype}"
        for check in CHECKS
        for backend in backends_of(check.partition("/")[0])
        for dtype in ("float32", "bfloat16")
    ]


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield the rows: errors, their tolerance and whether they are within it."""
    with compile_pool() as pool:
        programs = {
            key: pool.submit(attempt, {}, functools.partial(_compiled, key)) for key in missing
        }
        for key, program in programs.items():
            check, backend, dtype = key.rsplit("/", 2)
            row = {"key": key, "check": check, "backend": backend, "dtype": dtype}
            compiled = program.result()
            if "program" not in compiled:
                yield row | compiled
            else:
                yield attempt(row, functools.partial(_errors, check, dtype, compiled["program"]))


def _compiled(key: str) -> Row:
    try:
        arguments, program = lowered(key)
    except CannotServeError as error:
        return unserved(error)
    return {"program": functools.partial(program.compile(), *arguments)}


def unserved(error: CannotServeError) -> Row:
    """Return the row of a backend that does not support a check's arguments: not a failure."""
    return {"unserved": str(error), "summary": "not served"}


def lowered(key: str, place: Callable[[Any], Any] = lambda x: x) -> tuple[tuple, Any]:
    """Return the arguments of a key's program and the program, lowered for `place(arguments)`."""
    name, backend, dtype = key.rsplit("/", 2)
    check = CHECKS[name]
    run = check.run
    if name.partition("/")[0] in OPERATIONS:
        run = functools.partial(run, backend=backend)
    inputs = _cast(check.inputs(Random()), dtype)
    if not check.differentiated:
        return (inputs,), jax.jit(lambda inputs: (run(**inputs), {})).lower(place(inputs))

    def with_gradients(inputs: Arrays, cotangents: Any) -> Any:
        floats = {name: x for name, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        outputs, vjp = jax.vjp(lambda floats: run(**(inputs | floats)), floats)
        return outputs, vjp(cotangents)[0]

    shapes = jax.eval_shape(lambda inputs: run(**inputs), inputs)
    arguments = inputs, _cotangents(shapes)
    return arguments, jax.jit(with_gradients).lower(*place(arguments))


def _cast(inputs: Arrays, dtype: str) -> Arrays:
    return {name: x.astype(dtype) if name in _ROUNDED else x for name, x in inputs.items()}


def _cotangents(shapes: Any) -> Any:
    random = Random()
    return jax.tree.map(lambda x: np.asarray(random(*x.shape)).astype(x.dtype), shapes)


def _errors(name: str, dtype: str, program: Callable[[], Any]) -> Row:
    outputs, gradients = jax.device_get(program())
    check = CHECKS[name]
    inputs = _cast(check.inputs(Random()), dtype)
    expected = formulas.in_float64(check.formula, inputs, _cotangents(outputs))
    errors = [
        _error(a, e) for a, e in zip(*map(jax.tree.leaves, (outputs, expected[0])), strict=True)
    ]
    of_gradients = {n: _error(x, expected[1][n]) for n, x in gradients.items()}
    worst = max(of_gradients, key=lambda n: _as_number(of_gradients[n]), default=None)
    tolerance = TOLERANCES[dtype]
    right = all(error <= tolerance for error in (*errors, *of_gradients.values()))
    return {
        "error": max(errors, key=_as_number),
        "gradient_error": None if worst is None else of_gradients[worst],
        "worst_gradient": worst,
        "tolerance": tolerance,
        "right": right,
        "summary": "right" if right else "WRONG",
    }


def _error(found: Any, expected: Any) -> float:
    """Return the largest difference relative to the largest magnitude; NaN if a value is NaN."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    largest = np.max(np.abs(expected), initial=1e-9)
    return float(np.max(np.abs(found - expected), initial=0.0) / largest)


def _as_number(error: float) -> float:
    """Return an error for comparison; NaN counts as infinite."""
    return np.inf if np.isnan(error) else error
