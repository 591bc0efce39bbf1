"""The largest batch, with compilers that only count."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flowhn_jax.bench.largest_batch import Attempt, largest_batch

MEMORY = 10**6


class Compiler:
    """A compiler whose programs need memory linear in the batch; it records the sizes tried."""

    def __init__(self, memory, fixed, each, gives_sizes=True):
        self.memory, self.fixed, self.each = memory, fixed, each
        self.gives_sizes, self.tried = gives_sizes, []

    def fits(self, batch):
        return self.fixed + self.each * batch <= self.memory

    def __call__(self, batch):
        self.tried.append(batch)
        if not self.fits(batch) and not self.gives_sizes:
            return Attempt(batch, fits=False)
        return Attempt(batch, self.fits(batch), self.fixed, self.each * batch)

    def largest(self, most):
        """Return the answer by trying all powers of two; None if nothing fits."""
        sizes = [2**i for i in range(most.bit_length()) if 2**i <= most]
        return max((size for size in sizes if self.fits(size)), default=None)


@st.composite
def compilers(draw, gives_sizes=True):
    fixed = draw(st.integers(0, MEMORY - 1))
    each = draw(st.one_of(st.integers(1, MEMORY), st.integers(1, 100)))
    return Compiler(MEMORY, fixed, each, gives_sizes)


def check(compiler, start, most, attempts):
    expected = compiler.largest(most if most is not None else 2 * MEMORY)
    if expected is None:
        with pytest.raises(ValueError, match=r"Not even 1 sequence fits into 0\.00 GiB"):
            largest_batch(compiler, start, MEMORY, most)
    else:
        assert largest_batch(compiler, start, MEMORY, most).result == expected
    assert all(size & (size - 1) == 0 for size in compiler.tried)
    assert len(set(compiler.tried)) == len(compiler.tried)
    assert most is None or max(compiler.tried) <= most
    assert len(compiler.tried) <= attempts


@given(compilers(), st.integers(1, 4096), st.integers(0, 12))
def test_the_largest_power_of_two_that_fits(compiler, start, doublings):
    """Wherever the search starts, up to a bound that is a power of two."""
    most = 2 ** (start.bit_length() - 1 + doublings)
    check(compiler, start, most, attempts=6)


@given(compilers(), st.integers(1, 4096))
def test_without_a_bound(compiler, start):
    check(compiler, start, None, attempts=6)


@given(compilers(), st.integers(1, 4096), st.integers(1, 10**5))
def test_a_bound_that_is_not_a_power_of_two(compiler, start, most):
    assume(start <= most)
    check(compiler, start, most, attempts=6)


@given(compilers(), st.integers(1, 4096), st.integers(1, 4096))
def test_a_start_above_the_bound(compiler, start, most):
    assume(start > most)
    check(compiler, start, most, attempts=6)


@given(compilers(gives_sizes=False), st.integers(1, 4096), st.integers(0, 12))
def test_a_compiler_without_sizes_for_programs_that_do_not_fit(compiler, start, doublings):
    """Each smaller size has to be tried, but none twice."""
    most = 2 ** (start.bit_length() - 1 + doublings)
    check(compiler, start, most, attempts=start.bit_length() + 2)


@pytest.mark.parametrize("fixed", [MEMORY, MEMORY + 1])
def test_a_model_that_never_fits_is_not_tried_at_every_size(fixed):
    compiler = Compiler(MEMORY, fixed, 10)
    check(compiler, 2**20, 2**20, attempts=2)


def test_a_start_at_the_bound_needs_one_attempt():
    compiler = Compiler(MEMORY, 1000, 10)
    check(compiler, 64, 64, attempts=1)
    assert compiler.tried == [64]


def test_no_size_far_above_the_memory_is_tried():
    """Twice the batch would need 1.8 times the memory."""
    compiler = Compiler(MEMORY, 0, MEMORY * 9 // 80)
    check(compiler, 8, 1024, attempts=1)


def test_a_size_that_nearly_fits_by_the_estimate_is_tried():
    """Temporaries grow less than linearly: 16 sequences fit, though the estimate is above."""
    fits = {8: 600_000, 16: 990_000, 32: 1_700_000}

    def attempt(batch):
        return Attempt(batch, fits[batch] <= MEMORY, 0, fits[batch])

    assert largest_batch(attempt, 8, MEMORY, 1024).result == 16


def test_errors_of_an_attempt_are_raised():
    def refuse(batch):
        raise RuntimeError("no lowering")

    with pytest.raises(RuntimeError, match="no lowering"):
        largest_batch(refuse, 8, MEMORY)
