"""Measure a device's peak rates; with them, `LeastWork` bounds the time of a kernel from below."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from flowhn_jax.utils.timing import time_repeats

_REPEATS = 5
_EXPS_IN_A_ROW = (4, 32)  # few give a CPU's peak rate, many an accelerator's


@dataclasses.dataclass(frozen=True)
class MeasuredRates:
    """Measured rates of one device."""

    bytes_per_second: float  # of a copy: bytes read and bytes written
    matmul_flops_per_second: float  # in the benchmark's dtype
    exps_per_second: float  # float32


@dataclasses.dataclass(frozen=True)
class LeastWork:
    """The least work that an operation must do."""

    bytes: int  # every input and output once
    matmul_flops: int
    exps: int

    def floor_seconds(self, rates: MeasuredRates) -> float:
        """Return a lower bound of the time on a device of these rates: the three may overlap."""
        return max(
            self.bytes / rates.bytes_per_second,
            self.matmul_flops / rates.matmul_flops_per_second,
            self.exps / rates.exps_per_second,
        )


def _best_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    run = jax.jit(function)
    return min(time_repeats(lambda: run(*arguments), _REPEATS))


@cache
def measure_rates(dtype: str) -> MeasuredRates:
    """Return the rates of the default device.

    Copies and exps run on arrays of 1 GiB (64 MiB on a CPU), matrix products on squares of 8192
    (2048 on a CPU).

    Args:
      dtype: the dtype of the matrix products.
    """
    is_cpu = jax.default_backend() == "cpu"
    size = (2**26 if is_cpu else 2**30) // 4
    x = jnp.ones(size)
    copy = _best_seconds(lambda x: x + 1, x)

    side = 2048 if is_cpu else 8192
    matrix = jnp.ones((side, side), dtype)
    product = _best_seconds(lambda a: a @ a, matrix)

    def exps(count: int, x: jax.Array) -> jax.Array:
        for _ in range(count):
            x = jnp.exp(-x)
        return x

    return MeasuredRates(
        bytes_per_second=2 * x.nbytes / copy,
        matmul_flops_per_second=2 * side**3 / product,
        exps_per_second=max(
            count * x.size / _best_seconds(partial(exps, count), x) for count in _EXPS_IN_A_ROW
        ),
    )
