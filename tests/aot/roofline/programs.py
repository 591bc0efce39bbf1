"""Small programs compiled for absent hardware, whose work is known by hand."""

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from flowhn_jax.aot.roofline import rates
from flowhn_jax.aot.roofline.bound import bound
from tests.aot import cuda_target, tpu_target

TARGETS = ("v5e:2x2", "gpu:h100x1")


def device_of(target):
    """Return a device of a target; skip the test without the compiler."""
    if target.startswith("gpu"):
        return cuda_target.h100_mesh(data=1).devices.flat[0]
    return tpu_target.devices(target)[0]


def compiled_text(target, function, *arrays):
    """Return the text of a function compiled for one device and arrays (shape, dtype)."""
    place = SingleDeviceSharding(device_of(target))
    operands = [jax.ShapeDtypeStruct(*array, sharding=place) for array in arrays]
    return jax.jit(function).lower(*operands).compile().as_text()


def bound_of(target, function, *arrays, model_flops=1.0):
    """Return the bound of a function compiled for one device."""
    text = compiled_text(target, function, *arrays)
    return bound(text, rates_of(target), model_flops)


def rates_of(target):
    """Return the rates of a target's device."""
    found = rates.of_device(device_of(target))
    assert found is not None
    return found


on_targets = pytest.mark.parametrize("target", TARGETS)
