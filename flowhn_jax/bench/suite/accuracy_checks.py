"""The checks of part `accuracy`: operations with their options, inputs and plain formulas."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flowhn_jax.bench import formulas
from kernels.attention import attention, attention_step
from kernels.causal_conv import causal_conv
from kernels.cross_entropy import cross_entropy
from kernels.selective_scan import selective_scan, selective_scan_step
from kernels.ssd import ssd, ssd_step

Arrays = dict[str, Any]

_B, _L = 2, 77  # sequences and tokens, multiples of no tile


@dataclasses.dataclass(frozen=True)
class Check:
    """An operation with some of its options.

    Attributes:
      run: the operation; takes its arrays by name, and `backend` if it has several.
      formula: the same as a plain formula.
      inputs: makes the arrays in float32; integers and booleans are not differentiated.
      differentiated: False for the steps of decoding.
    """

    run: Callable[..., Any]
    formula: Callable[..., Any]
    inputs: Callable[["Random"], Arrays]
    differentiated: bool = True


class Random:
    """Normal float32 arrays from one seed."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, *shape: int) -> np.ndarray:
        """Return an array of a shape."""
        return self._rng.standard_normal(shape).astype(np.float32)

    def documents(self) -> np.ndarray:
        """Return segment ids [B, L] of documents of any length, one of a single token."""
        starts = self._rng.random((_B, _L)) < 0.1
        starts[:, 30:32] = True
        return starts.cumsum(1).astype(np.int32)


def _scan_inputs(random: Random, *, options: bool) -> Arrays:
    width, states = 40, 5
    arrays = {name: random(_B, _L, width) for name in ("u", "dt")}
    arrays |= {name: random(_B, _L, states) for name in ("B", "C")}
    arrays |= {"A": -np.exp(random(width, states)), "D": random(width)}
    if options:
        arrays |= {"z": random(_B, _L, width), "dt_bias": random(width)}
        arrays |= {"segment_ids": random.documents(), "initial_state": random(_B, width, states)}
    return arrays


def _ssd_inputs(random: Random, *, options: bool) -> Arrays:
    heads, groups, size, states = 4, 2, 12, 10
    arrays = {"x": random(_B, _L, heads, size), "dt": random(_B, _L, heads)}
    arrays |= {name: random(_B, _L, groups, states) for name in ("B", "C")}
    arrays |= {"A": -np.exp(random(heads)), "D": random(heads)}
    if options:
        arrays |= {"dt_bias": random(heads), "segment_ids": random.documents()}
        arrays |= {"initial_state": random(_B, heads, size, states)}
    return arrays


def _attention_inputs(random: Random, *, documents: bool) -> Arrays:
    arrays = {"q": random(_B, _L, 4, 24)} | {name: random(_B, _L, 2, 24) for name in "kv"}
    return arrays | ({"segment_ids": random.documents()} if documents else {})


def _conv_inputs(random: Random, *, options: bool) -> Arrays:
    arrays = {"x": random(_B, _L, 40), "weight": random(4, 40), "bias": random(40)}
    if options:
        arrays |= {"segment_ids": random.documents(), "initial_state": random(_B, 3, 40)}
    return arrays


def _loss_inputs(random: Random) -> Arrays:
    tokens, width, vocabulary = _B * _L, 24, 101
    return {
        "hidden": random(tokens, width),
        "head": random(width, vocabulary) / np.sqrt(width),
        "targets": (np.arange(tokens) * 31 % vocabulary).astype(np.int32),
        "weights": np.abs(random(tokens)) * (np.arange(tokens) % 5 > 0),
    }


def _one_token(arrays: Arrays) -> Arrays:
    """Return the arrays of a step from a sequence's: the first token and the state before it."""
    taken = {
        name: x[:, 0] if x.ndim > 2 and x.shape[:2] == (_B, _L) else x
        for name, x in arrays.items()
        if name != "segment_ids"
    }
    taken["state"] = taken.pop("initial_state")
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
    """Return the arrays of a sequence of one token from a step's."""
    found = {name: x[:, None] if name in of_tokens else x for name, x in arrays.items()}
    return found | {"initial_state": found.pop("state")}


def _attention_step_inputs(random: Random) -> Arrays:
    visible = np.asarray(np.arange(_L) < np.array([[40], [_L]]))
    caches = {name: random(_B, 2, _L, 24) for name in "kv"}
    return {"q": random(_B, 4, 24), **caches, "visible": visible}


def _attention_step_formula(q: Any, k: Any, v: Any, visible: Any) -> Any:
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    weights = visible[:, None] * jnp.exp(jnp.einsum("bhk,bhck->bhc", q, k) / np.sqrt(q.shape[-1]))
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.einsum("bhc,bhck->bhk", weights, v)


def _with_state(
    run: Callable[..., Any],
    formula: Callable[..., Any],
    inputs: Callable[..., Arrays],
    **options: Any,
) -> Check:
    """Return the check of an operation that returns its final state, too."""
    run = functools.partial(run, return_final_state=True)
    return Check(run, formula, functools.partial(inputs, **options))


def _attention_check(*, documents: bool, **options: Any) -> Check:
    run, formula = (functools.partial(f, **options) for f in (attention, formulas.attention))
    return Check(run, formula, functools.partial(_attention_inputs, documents=documents))


CHECKS = {
    "selective_scan/plain": _with_state(
        selective_scan, formulas.selective_scan, _scan_inputs, options=False
    ),
    "selective_scan/documents, state, gate": _with_state(
        selective_scan, formulas.selective_scan, _scan_inputs, options=True
    ),
    "attention/plain": _attention_check(documents=False),
    "attention/documents": _attention_check(documents=True),
    "attention/window": _attention_check(documents=False, window=19),
    "attention/window, prefix": _attention_check(documents=True, window=19, prefix=5),
    "ssd/plain": _with_state(ssd, formulas.ssd, _ssd_inputs, options=False),
    "ssd/documents, state": _with_state(ssd, formulas.ssd, _ssd_inputs, options=True),
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
    "causal_conv/plain": _with_state(
        causal_conv, formulas.causal_conv, _conv_inputs, options=False
    ),
    "causal_conv/documents, state": _with_state(
        causal_conv, formulas.causal_conv, _conv_inputs, options=True
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
