"""The error of a device with too little memory."""

import sys


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether JAX's runtime raised an error for too little memory on a device."""
    jax = sys.modules.get("jax")
    is_of_runtime = jax is not None and isinstance(error, jax.errors.JaxRuntimeError)
    return is_of_runtime and "RESOURCE_EXHAUSTED" in str(error)
