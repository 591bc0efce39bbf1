import logging

import jax
import jax.numpy as jnp
import pytest

from kernels import backends
from kernels.backends import Backend, Operation


def operation(best_serves=True):
    return Operation(
        "double",
        {
            "fast": Backend(
                lambda x: x + x,
                ("cpu",),
                lambda x: None if best_serves else f"{x.dtype} is not for it",
            ),
            "far": Backend(lambda x: 2 * x, ("tpu",)),
            "xla": Backend(lambda x: 2 * x),
        },
        {"cpu": ("fast", "xla"), "gpu": ("xla",), "tpu": ("far", "xla")},
    )


def chosen(op, **kwargs):
    with backends.record() as record:
        op.choose(jnp.ones(3), **kwargs)
    return record["double"].pop()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    backends._log_once.cache_clear()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", "fast"), ("xla", "xla"), ("double=xla", "xla"), ("other=xla", "fast")],
)
def test_as_the_user_asks(monkeypatch, asked, expected):
    with backends.use(asked):
        assert chosen(operation()) == expected
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, asked)
    with backends.use("double=xla" if expected == "fast" else "auto"):
        assert chosen(operation()) == expected


def test_what_cannot_serve_gives_way_with_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert chosen(operation(best_serves=False)) == "xla"
    (line,) = caplog.messages
    assert line == "double: fast cannot serve (float32 is not for it); it runs on xla"
    with caplog.at_level(logging.WARNING), backends.use("double=far"):
        assert chosen(operation()) == "fast"
    assert "far cannot serve (it is for tpu, this is cpu); it runs on fast" in caplog.messages[-1]


def test_a_named_backend_is_taken_or_refused():
    assert chosen(operation(), backend="xla") == "xla"
    with pytest.raises(ValueError, match="'fast' cannot serve: float32 is not for it"):
        operation(best_serves=False).choose(jnp.ones(3), backend="fast")
    with pytest.raises(ValueError, match="unknown backend 'slow'; accepted: 'far', 'fast', 'xla'"):
        operation().choose(jnp.ones(3), backend="slow")
    with backends.use("double=slow"), pytest.raises(ValueError, match="unknown backend 'slow'"):
        operation().choose(jnp.ones(3))


def test_a_jitted_function_is_traced_anew_for_another_backend():
    op = operation()

    @jax.jit
    def double(x):
        return op.choose(x)(x)

    for asked, expected in (("auto", {"fast"}), ("xla", {"xla"}), ("auto", None)):
        with backends.use(asked), backends.record() as record:
            double(1.0)
        assert record.get("double") == expected


def test_records_that_are_equal_are_two():
    with backends.record() as outer:
        with backends.record():
            operation().choose(jnp.ones(3))
        assert outer == {"double": {"fast"}}
        with backends.use("xla"):
            operation().choose(jnp.ones(3))
    assert outer == {"double": {"fast", "xla"}}


@pytest.mark.parametrize(
    "asked", ["", "fast", "double=", "=xla", "double=xla,,", "*=xla", "double=xla,double=far"]
)
def test_malformed(asked):
    with pytest.raises(ValueError, match="accepted is 'auto', 'xla' or OPERATION=BACKEND"):
        backends.parse(asked)
