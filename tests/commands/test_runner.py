"""Errors of a command as one clear message."""

import jax
import pytest

from flowhn_jax.commands import runner


def message_of(error):
    """Return what a command whose function raises an error ends with."""
    with pytest.raises(SystemExit) as ended, runner.command("eval", lambda flags: print, []):
        raise error
    return ended.value.code


def test_too_little_memory_on_a_device_is_the_users_to_solve():
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nAllocations: ..."
    assert message_of(jax.errors.JaxRuntimeError(text)) == (
        "error: the device has too little memory: RESOURCE_EXHAUSTED: Out of memory while trying "
        "to allocate 9 bytes. Lower train.batch_size, raise train.accumulate, or set "
        "--config.train.remat=full."
    )


def test_another_error_of_the_runtime_keeps_its_traceback():
    with pytest.raises(jax.errors.JaxRuntimeError), runner.command("eval", lambda flags: print, []):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")
