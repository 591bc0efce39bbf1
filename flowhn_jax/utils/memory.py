"""Memory: how the C library treats what is freed, and the error of a device with too little."""

import ctypes
import sys

# mallopt's parameters (glibc, malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether JAX's runtime raised an error for too little memory on a device."""
    jax = sys.modules.get("jax")
    is_of_runtime = jax is not None and isinstance(error, jax.errors.JaxRuntimeError)
    return is_of_runtime and "RESOURCE_EXHAUSTED" in str(error)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, up to 2 GiB, rather than return it to the kernel.

    XLA's CPU backend allocates its temporaries again in every step. By default they are mapped,
    zeroed page by page and unmapped each time, which takes about a quarter of a small model's step.
    They come from XLA's threads, whose own arenas hold no large block: hence a single arena. Call
    this before the first array is made; with another C library, or one that refuses, it does
    nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(_MMAP_THRESHOLD, 2**30):
        mallopt(_ARENA_MAX, 1)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 2**28)
