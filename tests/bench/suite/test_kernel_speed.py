"""Times of our code and the authors', alternately."""

from flowhn_jax.bench.suite import kernel_speed


def test_two_functions_alternate_after_a_warm_up():
    calls = []
    found = kernel_speed.alternating((lambda: calls.append("a"), lambda: calls.append("b")))
    assert calls == ["a", "b"] * 4  # the first of each is not timed
    assert found["ratio"] > 0
    assert found["seconds"] > 0
