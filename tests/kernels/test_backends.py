import logging

import jax
import jax.numpy as jnp
import pytest

from kernels import backends
from kernels.backends import Backend, Operation


def operation(best_runs=True):
    return Operation(
        "double",
        {
            "fast": Backend(
                lambda x: x + x,
                ("cpu",),
                lambda x: None if best_runs else f"it cannot take {x.dtype}",
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
def test_the_user_chooses(monkeypatch, asked, expected):
    with backends.use(asked):
        assert chosen(operation()) == expected
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, asked)
    with backends.use("double=xla" if expected == "fast" else "auto"):
        assert chosen(operation()) == expected


def test_the_next_best_runs_what_the_best_cannot_with_one_log_line(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert chosen(operation(best_runs=False)) == "xla"
    (line,) = caplog.messages
    assert line == "double: cannot run on fast (it cannot take float32); running on xla instead"
    with caplog.at_level(logging.WARNING), backends.use("double=far"):
        assert chosen(operation()) == "fast"
    reason = "cannot run on far (it needs platform tpu, this is cpu); running on fast instead"
    assert reason in caplog.messages[-1]


def test_a_named_backend_runs_or_is_refused():
    assert chosen(operation(), backend="xla") == "xla"
    with pytest.raises(ValueError, match="cannot run on backend 'fast': it cannot take float32"):
        operation(best_runs=False).choose(jnp.ones(3), backend="fast")
    with pytest.raises(ValueError, match="must be one of 'far', 'fast', 'xla'; got 'slow'"):
        operation().choose(jnp.ones(3), backend="slow")
    with backends.use("double=slow"), pytest.raises(ValueError, match="got 'slow'"):
        operation().choose(jnp.ones(3))


def test_a_jitted_function_is_traced_again_for_another_backend():
    op = operation()

    @jax.jit
    def double(x):
        return op.choose(x)(x)

    for asked, expected in (("auto", {"fast"}), ("xla", {"xla"}), ("auto", None)):
        with backends.use(asked), backends.record() as record:
            double(1.0)
        assert record.get("double") == expected


def test_nested_records_are_separate():
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
    with pytest.raises(ValueError, match="must be 'auto', 'xla' or OPERATION=BACKEND"):
        backends.parse(asked)
