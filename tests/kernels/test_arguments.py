"""Valid arguments of the public operations: dtypes, sizes, no skip, infinite decay rates."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attention, attention_step
from kernels.causal_conv import causal_conv
from kernels.cross_entropy import cross_entropy
from kernels.selective_scan import selective_scan, selective_scan_step
from kernels.ssd import ssd, ssd_step

B, L, E, S, H, P, G, K, W, V, C = 2, 5, 4, 3, 4, 2, 2, 6, 3, 7, 8
INTEGERS = ("segment_ids", "targets")
# By operation, each array's layout; sizes are those above.
LAYOUTS = {
    selective_scan: {
        "u": "BLE", "dt": "BLE", "A": "ES", "B": "BLS", "C": "BLS", "D": "E", "z": "BLE",
        "dt_bias": "E", "segment_ids": "BL", "initial_state": "BES",
    },
    selective_scan_step: {
        "u": "BE", "dt": "BE", "A": "ES", "B": "BS", "C": "BS", "D": "E", "state": "BES",
        "z": "BE", "dt_bias": "E",
    },
    ssd: {
        "x": "BLHP", "dt": "BLH", "A": "H", "B": "BLGS", "C": "BLGS", "D": "H", "dt_bias": "H",
        "segment_ids": "BL", "initial_state": "BHPS",
    },
    ssd_step: {
        "x": "BHP", "dt": "BH", "A": "H", "B": "BGS", "C": "BGS", "D": "H", "state": "BHPS",
        "dt_bias": "H",
    },
    causal_conv: {"x": "BLE", "weight": "WE", "bias": "E", "segment_ids": "BL"},
    attention: {"q": "BLHK", "k": "BLGK", "v": "BLGK", "segment_ids": "BL"},
    attention_step: {"q": "BHK", "k": "BGCK", "v": "BGCK", "visible": "BC"},
    cross_entropy: {"hidden": "BLE", "head": "EV", "targets": "BL", "weights": "BL"},
}  # fmt: skip

operations = pytest.mark.parametrize("operation", LAYOUTS, ids=lambda f: f.__name__)


def arguments(operation, rng=None, empty=None):
    """Return valid arguments by name, with the letter `empty` of size 0."""
    rng = rng or np.random.default_rng(0)
    args = {}
    for name, layout in LAYOUTS[operation].items():
        shape = tuple(0 if letter == empty else globals()[letter] for letter in layout)
        args[name] = rng.standard_normal(shape).astype(np.float32)
        if name in INTEGERS:
            args[name] = np.zeros(shape, np.int32)
        if name == "visible":
            args[name] = np.ones(shape, bool)
    return args


@operations
def test_arrays_of_other_kinds_are_refused(operation):
    """Complex and integer dtypes for floats, float ids, lists, None for a required array."""
    args = arguments(operation)
    optional = inspect.signature(operation).parameters
    for name, x in args.items():
        others = [np.float32] if name in INTEGERS else [np.complex64, np.int32]
        others = [np.float32, np.int32] if name == "visible" else others
        for dtype in others:
            with pytest.raises(
                ValueError, match=rf"{operation.__name__}: {name} must have .*; got"
            ):
                operation(**args | {name: x.astype(dtype)})
        with pytest.raises(ValueError, match=rf"{operation.__name__}: {name} must be .*; got list"):
            operation(**args | {name: x.tolist()})
        if optional[name].default is inspect.Parameter.empty and name != "D":
            with pytest.raises(
                ValueError, match=rf"{operation.__name__}: {name} must be .*; got None"
            ):
                operation(**args | {name: None})


@operations
def test_shapes_that_do_not_match_are_refused(operation):
    """For a first dimension of each array that others have as well."""
    args = arguments(operation)
    for name, x in args.items():
        if name == "weight":  # its first dimension is the number of taps
            continue
        with pytest.raises(ValueError, match=rf"{operation.__name__}: .* must be \[.*\] = .*; got"):
            operation(**args | {name: np.concatenate([x, x])})


@operations
def test_sizes_of_zero_are_refused(operation):
    """For all dimensions; the message names an array."""
    names = "|".join(LAYOUTS[operation])
    for letter in sorted(set("".join(LAYOUTS[operation].values()))):
        if operation is cross_entropy and letter in "BL":
            continue  # the loss of no tokens is 0
        args = arguments(operation, empty=letter)
        with pytest.raises(ValueError, match=rf"{operation.__name__}: ({names}) must be .*\b0\b"):
            operation(**args)


def runs(operation):
    """Return the ways to run an operation, by name."""
    if operation is not selective_scan:
        return {"default": operation}
    backends = "xla_sequential", "xla_associative"
    return {
        name: lambda backend=name, **args: selective_scan(**args, backend=backend)
        for name in backends
    }


scans = pytest.mark.parametrize(
    "operation", [selective_scan, selective_scan_step, ssd, ssd_step], ids=lambda f: f.__name__
)


@scans
def test_no_skip_is_a_skip_of_zero(operation, rng):
    args = arguments(operation, rng)
    for run in runs(operation).values():
        found = jax.tree.leaves(run(**args | {"D": None}))
        expected = jax.tree.leaves(run(**args | {"D": np.zeros_like(args["D"])}))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@scans
def test_infinite_decay_rates_forget_everything(operation, rng):
    """Results and gradients are those of very large rates; a zero time step keeps the state."""
    args = arguments(operation, rng)
    args["dt"][:, -1] = -1e9  # a step of zero
    floats = {name: x for name, x in args.items() if name not in INTEGERS}

    def value_and_grad(run, A):
        def total(floats):
            results = jax.tree.leaves(run(**args | floats))
            return sum((x**2).sum() for x in results), results

        return jax.value_and_grad(total, has_aux=True)(floats | {"A": jnp.asarray(A)})

    for run in runs(operation).values():
        found = value_and_grad(run, np.full_like(args["A"], -np.inf))
        expected = value_and_grad(run, np.full_like(args["A"], -9e29))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert jnp.isfinite(a).all()
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        assert not found[1]["A"].any()
