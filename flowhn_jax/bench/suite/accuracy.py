"""Part `accuracy`: every operation and backend of this device against float64, at odd shapes.

Values and gradients, in float32 and bfloat16, plain and with documents, states and the other
options. The references are `bench.formulas`, on the CPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowhn_jax.bench import formulas
from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.kernels import backends_of
from flowhn_jax.bench.suite.workload import Earlier, compile_pool
from kernels.attention import attention, attention_step
from kernels.backends import CannotServeError
from kernels.causal_conv import causal_conv
from kernels.cross_entropy import cross_entropy
from kernels.operations import OPERATIONS
from kernels.selective_scan import selective_scan, selective_scan_step
from kernels.ssd import ssd, ssd_step

Arrays = dict[str, Any]

# Of the largest magnitude of a result: what rounding explains. A wrong kernel is off by far more.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}

_B, _L = 2, 77  # sequences and tokens, off every tile
_ROUNDED = ("u", "z", "x", "q", "k", "v", "hidden")  # arguments in the compute dtype


@dataclasses.dataclass(frozen=True)
class Check:
    """An operation with some of its options.

    Attributes:
      run: the operation, of its arrays by name, with the keyword `backend` where it has several.
      formula: the same, computed plainly.
      inputs: makes the arrays in float32; integers and booleans are not differentiated.
      differentiated: False for the steps of decoding.
    """

    run: Callable[..., Any]
    formula: Callable[..., Any]
    inputs: Callable[["_Random"], Arrays]
    differentiated: bool = True


class _Random:
    """Normal float32 arrays from one seed."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, *shape: int) -> np.ndarray:
        return self._rng.standard_normal(shape).astype(np.float32)

    def documents(self) -> np.ndarray:
        """Return segment ids [B, L] of documents of any lengths, of one token too."""
        starts = self._rng.random((_B, _L)) < 0.1
        starts[:, 30:32] = True
        return starts.cumsum(1).astype(np.int32)


def _scan_inputs(random: _Random, *, options: bool) -> Arrays:
    width, states = 40, 5
    arrays = {name: random(_B, _L, width) for name in ("u", "dt")}
    arrays |= {name: random(_B, _L, states) for name in ("B", "C")}
    arrays |= {"A": -np.exp(random(width, states)), "D": random(width)}
    if options:
        arrays |= {"z": random(_B, _L, width), "dt_bias": random(width)}
        arrays |= {"segment_ids": random.documents(), "initial_state": random(_B, width, states)}
    return arrays


def _ssd_inputs(random: _Random, *, options: bool) -> Arrays:
    heads, groups, size, states = 4, 2, 12, 10
    arrays = {"x": random(_B, _L, heads, size), "dt": random(_B, _L, heads)}
    arrays |= {name: random(_B, _L, groups, states) for name in ("B", "C")}
    arrays |= {"A": -np.exp(random(heads)), "D": random(heads)}
    if options:
        arrays |= {"dt_bias": random(heads), "segment_ids": random.documents()}
        arrays |= {"initial_state": random(_B, heads, size, states)}
    return arrays


def _attention_inputs(random: _Random, *, documents: bool) -> Arrays:
    arrays = {"q": random(_B, _L, 4, 24)} | {name: random(_B, _L, 2, 24) for name in "kv"}
    return arrays | ({"segment_ids": random.documents()} if documents else {})


def _conv_inputs(random: _Random, *, options: bool) -> Arrays:
    arrays = {"x": random(_B, _L, 40), "weight": random(4, 40), "bias": random(40)}
    if options:
        arrays |= {"segment_ids": random.documents(), "initial_state": random(_B, 3, 40)}
    return arrays


def _loss_inputs(random: _Random) -> Arrays:
    tokens, width, vocabulary = _B * _L, 24, 101
    return {
        "hidden": random(tokens, width),
        "head": random(width, vocabulary) / np.sqrt(width),
        "targets": (np.arange(tokens) * 31 % vocabulary).astype(np.int32),
        "weights": np.abs(random(tokens)) * (np.arange(tokens) % 5 > 0),
    }


def _one_token(arrays: Arrays, state: str = "state") -> Arrays:
    """Return a step's arrays of those of a sequence: the first token's, and the state before it."""
    sequences = {name: x for name, x in arrays.items() if name not in ("segment_ids",)}
    taken = {
        name: x[:, 0] if x.ndim > 2 and x.shape[:2] == (_B, _L) else x
        for name, x in sequences.items()
    }
    taken[state] = taken.pop("initial_state")
    return taken


def _scan_step_formula(**arrays: Any) -> Any:
    arrays = _as_sequence(arrays, ("u", "dt", "B", "C", "z"))
    y, state = formulas.selective_scan(**arrays)
    return y[:, 0], state


def _ssd_step_formula(**arrays: Any) -> Any:
    arrays = _as_sequence(arrays, ("x", "dt", "B", "C"))
    y, state = formulas.ssd(**arrays)
    return y[:, 0], state


def _as_sequence(arrays: Mapping[str, Any], of_tokens: tuple[str, ...]) -> Arrays:
    found = {name: x[:, None] if name in of_tokens else x for name, x in arrays.items()}
    return found | {"initial_state": found.pop("state")}


def _attention_step_inputs(random: _Random) -> Arrays:
    visible = np.asarray(np.arange(_L) < np.array([[40], [_L]]))
    caches = {name: random(_B, 2, _L, 24) for name in "kv"}
    return {"q": random(_B, 4, 24), **caches, "visible": visible}


def _attention_step_formula(q: Any, k: Any, v: Any, visible: Any) -> Any:
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    weights = visible[:, None] * jnp.exp(jnp.einsum("bhk,bhck->bhc", q, k) / np.sqrt(q.shape[-1]))
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.einsum("bhc,bhck->bhk", weights, v)


CHECKS = {
    "selective_scan/plain": Check(
        functools.partial(selective_scan, return_final_state=True),
        formulas.selective_scan,
        functools.partial(_scan_inputs, options=False),
    ),
    "selective_scan/documents, state, gate": Check(
        functools.partial(selective_scan, return_final_state=True),
        formulas.selective_scan,
        functools.partial(_scan_inputs, options=True),
    ),
    "attention/plain": Check(
        attention, formulas.attention, functools.partial(_attention_inputs, documents=False)
    ),
    "attention/documents": Check(
        attention, formulas.attention, functools.partial(_attention_inputs, documents=True)
    ),
    "attention/window": Check(
        functools.partial(attention, window=19),
        functools.partial(formulas.attention, window=19),
        functools.partial(_attention_inputs, documents=False),
    ),
    "attention/window, prefix": Check(
        functools.partial(attention, window=19, prefix=5),
        functools.partial(formulas.attention, window=19, prefix=5),
        functools.partial(_attention_inputs, documents=True),
    ),
    "ssd/plain": Check(
        functools.partial(ssd, return_final_state=True),
        formulas.ssd,
        functools.partial(_ssd_inputs, options=False),
    ),
    "ssd/documents, state": Check(
        functools.partial(ssd, return_final_state=True),
        formulas.ssd,
        functools.partial(_ssd_inputs, options=True),
    ),
    "cross_entropy/sum, z-loss": Check(
        functools.partial(cross_entropy, z_loss=1e-2, chunk_size=50),
        lambda **arrays: formulas.cross_entropy(**arrays, z_loss=1e-2).sum(),
        _loss_inputs,
    ),
    "cross_entropy/per token": Check(
        functools.partial(cross_entropy, reduction="none", chunk_size=50),
        formulas.cross_entropy,
        _loss_inputs,
    ),
    "causal_conv/plain": Check(
        functools.partial(causal_conv, return_final_state=True),
        formulas.causal_conv,
        functools.partial(_conv_inputs, options=False),
    ),
    "causal_conv/documents, state": Check(
        functools.partial(causal_conv, return_final_state=True),
        formulas.causal_conv,
        functools.partial(_conv_inputs, options=True),
    ),
    "selective_scan_step/gate": Check(
        selective_scan_step,
        _scan_step_formula,
        lambda random: _one_token(_scan_inputs(random, options=True)),
        differentiated=False,
    ),
    "ssd_step/plain": Check(
        ssd_step,
        _ssd_step_formula,
        lambda random: _one_token(_ssd_inputs(random, options=True)),
        differentiated=False,
    ),
    "attention_step/plain": Check(
        attention_step, _attention_step_formula, _attention_step_inputs, differentiated=False
    ),
}


def plan() -> list[str]:
    """Return CHECK/BACKEND/DTYPE for each check, backend of this platform and dtype."""
    return [
        f"{check}/{backend}/{dtype}"
        for check in CHECKS
        for backend in backends_of(check.partition("/")[0])
        for dtype in ("float32", "bfloat16")
    ]


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield the rows: errors, their tolerance and whether they are below it."""
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
    """Return the row of a backend that does not take a check's arguments: an answer, no failure."""
    return {"unserved": str(error), "summary": "not served"}


def lowered(key: str, place: Callable[[Any], Any] = lambda x: x) -> tuple[tuple, Any]:
    """Return a key's arguments and its program, lowered for `place(arguments)`."""
    name, backend, dtype = key.rsplit("/", 2)
    check = CHECKS[name]
    run = check.run
    if name.partition("/")[0] in OPERATIONS:
        run = functools.partial(run, backend=backend)
    inputs = _cast(check.inputs(_Random()), dtype)
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
    random = _Random()
    return jax.tree.map(lambda x: np.asarray(random(*x.shape)).astype(x.dtype), shapes)


def _errors(name: str, dtype: str, program: Callable[[], Any]) -> Row:
    outputs, gradients = jax.device_get(program())
    check = CHECKS[name]
    inputs = _cast(check.inputs(_Random()), dtype)
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
    """Return the largest difference, over the largest magnitude; NaN where a value is NaN."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    largest = np.max(np.abs(expected), initial=1e-9)
    return float(np.max(np.abs(found - expected), initial=0.0) / largest)


def _as_number(error: float) -> float:
    """Return an error for comparison, where NaN is the largest."""
    return np.inf if np.isnan(error) else error
