"""Bounds of small programs, compiled for a TPU and for a GPU, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from flowhn_jax.aot.roofline.categories import CATEGORIES, COLLECTIVES, MOVES, PRODUCTS
from tests.aot.roofline.programs import bound_of, on_targets, rates_of

pytestmark = pytest.mark.aot

BF16, F32 = jnp.bfloat16, jnp.float32


def ms(seconds):
    return pytest.approx(1e3 * seconds, rel=1e-6)


@on_targets
def test_a_matrix_product(target):
    m, k, n = 2048, 1024, 4096
    found = bound_of(
        target, jnp.matmul, ((m, k), BF16), ((k, n), BF16), model_flops=2.0 * m * k * n
    )
    rates = rates_of(target)
    flops, moved = 2 * m * k * n, 2 * (m * k + k * n + m * n)
    assert flops / rates.flops > moved / rates.bandwidth
    assert found.parts[PRODUCTS].milliseconds == ms(flops / rates.flops)
    # A program for a TPU begins with a copy of one factor to VMEM.
    copy = found.milliseconds - found.parts[PRODUCTS].milliseconds
    assert 0 <= copy <= (1e3 * 2 * k * n / rates.bandwidth if target.startswith("v5e") else 1e-9)
    assert copy == found.parts[MOVES].milliseconds
    assert found.mfu == pytest.approx(1e3 * flops / rates.flops / found.milliseconds)
    assert found.gigabytes == pytest.approx(moved / 1e9)
    assert found.heaviest[0].limit == "flops"
    assert "dot_general" in found.heaviest[0].operation


@on_targets
def test_a_product_of_few_rows_is_limited_by_its_bytes(target):
    k, n = 2048, 8192
    found = bound_of(target, jnp.matmul, ((16, k), BF16), ((k, n), BF16))
    moved = 2 * (16 * k + k * n + 16 * n)
    # XLA splits the product for GPUs, and adds up the parts; a TPU copies a factor first.
    least = 1e3 * moved / rates_of(target).bandwidth
    assert (1 - 1e-6) * least <= found.milliseconds <= 1.2 * least
    assert found.heaviest[0].limit == "bytes"


@on_targets
def test_a_loop_runs_as_often_as_its_counter_says(target):
    def loop(x, weights):
        return lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ weights), x)

    n = 1024
    found = bound_of(target, loop, ((n, n), BF16), ((n, n), BF16))
    products = sum(part.flops_milliseconds for part in found.parts.values())
    assert products == ms(7 * 2 * n**3 / rates_of(target).flops)
    assert found.heaviest[0].count >= 7


@on_targets
def test_a_transposition_is_a_move(target):
    shape = (4096, 2048)
    found = bound_of(target, lambda x: x.T.copy(), (shape, F32))
    moved = 2 * 4 * shape[0] * shape[1]
    assert found.parts[MOVES].gigabytes == pytest.approx(moved / 1e9)
    assert found.milliseconds == found.parts[MOVES].milliseconds


@on_targets
def test_a_slice_reads_what_it_returns(target):
    def middle(x, start):
        return lax.dynamic_slice_in_dim(x, start, 128) * 2

    found = bound_of(target, middle, ((65536, 1024), F32), ((), jnp.int32))
    assert found.gigabytes == pytest.approx(2 * 128 * 1024 * 4 / 1e9, rel=0.02)


@on_targets
def test_the_fastest_branch_of_a_conditional_counts(target):
    def choose(which, x):
        return lax.cond(which, lambda x: x @ x @ x, lambda x: x + 1, x)

    n = 2048
    found = bound_of(target, choose, ((), jnp.bool_), ((n, n), BF16))
    assert sum(part.flops_milliseconds for part in found.parts.values()) == 0
    assert found.milliseconds < 1e3 * 4 * n**3 / rates_of(target).flops


def test_vector_units_can_be_the_limit():
    """Hundreds of operations per element of a TPU that are read once."""

    def polynomial(x):
        y = x
        for i in range(400):
            y = y * x + (i + 0.5)
        return y

    n = 2**22
    found = bound_of("v5e:2x2", polynomial, ((n,), F32))
    assert found.heaviest[0].limit == "vector"
    assert found.milliseconds == pytest.approx(1e3 * 800 * n / 4096 / 1.503e9, rel=0.02)


def test_the_table_has_all_parts():
    found = bound_of("v5e:2x2", jnp.sin, ((128, 128), F32)).to_dict()
    assert list(found["parts"]) == list(CATEGORIES)
    assert found["parts"][COLLECTIVES]["milliseconds"] == 0
    assert not found["kernels_by_schedule"]
    assert jax.tree.leaves(found)
