"""Compile times of programs from the persistent cache, against the events that JAX reports."""

import collections
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from flowhn_jax.utils.timing import compile_timed

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


# JAX stores whole seconds with a program, so the large program must take several.
LARGE, SMALL, NEW = 300, 2, 3

CACHE = "/jax/compilation_cache/"
REQUESTS, HITS, MISSES = (
    CACHE + name for name in ("compile_requests_use_cache", "cache_hits", "cache_misses")
)
SAVED, RETRIEVAL = CACHE + "compile_time_saved_sec", CACHE + "cache_retrieval_time_sec"
COMPILATION = "/jax/core/compile/backend_compile_duration"


class Timed(NamedTuple):
    """What `compile_timed` returns, and what happened during the call."""

    compiled: jax.stages.Compiled
    seconds: float
    elapsed: float  # seconds of the whole call
    events: collections.Counter  # of JAX in this thread: counts, or seconds of those with durations

    @property
    def requests_hits_misses(self):
        return tuple(self.events[name] for name in (REQUESTS, HITS, MISSES))

    @property
    def stored(self):
        """Return the seconds that the cache stores with the program."""
        return round(self.events[SAVED] + self.events[RETRIEVAL])


def measure(lowered):
    """Call `compile_timed`, and record JAX's events of this thread."""
    events, thread = collections.Counter(), threading.get_ident()

    def record(event, seconds=1, **_):
        if threading.get_ident() == thread:
            events[event] += seconds

    jax.monitoring.register_event_listener(record)
    jax.monitoring.register_event_duration_secs_listener(record)
    start = time.perf_counter()
    compiled, seconds = compile_timed(lowered)
    elapsed = time.perf_counter() - start
    jax.monitoring.unregister_event_listener(record)
    jax.monitoring.unregister_event_duration_listener(record)
    return Timed(compiled, seconds, elapsed, events)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Yield the folder of a persistent cache, initially empty, that stores every program."""
    folder = tmp_path_factory.mktemp("cache")
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, value in zip(OPTIONS, (str(folder), 0.0, -1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def lower(steps):
    """Lower a chain of sorts of different shapes; a longer chain takes longer to compile."""

    def chain(x):
        for i in range(steps):
            x = jnp.sort(x[: 2000 - i] * (i + 1.5)) + jnp.cumsum(x[: 2000 - i])
        return x

    jax.clear_caches()
    return jax.jit(chain).lower(jax.ShapeDtypeStruct((2000,), "float32"))


@pytest.fixture(scope="module")
def first(cache):
    """Return how the large program, which is in the cache afterwards, was compiled."""
    assert not any(cache.iterdir())
    first = measure(lower(LARGE))
    assert first.requests_hits_misses == (1, 0, 1)
    assert any(cache.iterdir())
    return first


def assert_has_its_original_compile_time(timed, first):
    """Assert that a program was loaded, and that its seconds are those that were stored with it.

    To these the call adds what it does besides loading, such as finding the program's key.
    """
    assert timed.requests_hits_misses == (1, 1, 0)  # so nothing was compiled
    assert 1 <= timed.stored <= first.events[COMPILATION] <= first.seconds
    assert timed.stored <= timed.seconds <= timed.elapsed + timed.events[SAVED]


def test_a_program_from_the_cache_has_its_original_compile_time(first):
    timed = measure(lower(LARGE))
    assert_has_its_original_compile_time(timed, first)
    assert timed.compiled(jnp.ones(2000)).shape == (2000 - LARGE + 1,)


def test_a_program_that_is_not_in_the_cache_has_the_elapsed_time(first):
    """Even if the thread has loaded a program from the cache before."""
    compile_timed(lower(LARGE))
    timed = measure(lower(NEW))
    assert timed.requests_hits_misses == (1, 0, 1)
    assert timed.events[COMPILATION] <= timed.seconds <= timed.elapsed


class Together:
    """A lowered program whose compilation begins and ends together with that of another."""

    def __init__(self, lowered, barrier):
        self.lowered, self.barrier = lowered, barrier

    def compile(self):
        self.barrier.wait()
        compiled = self.lowered.compile()
        self.barrier.wait()
        return compiled


def test_each_thread_counts_only_its_programs(first):
    """A large and a small program are loaded from the cache at the same time."""
    compile_timed(lower(SMALL))
    barrier = threading.Barrier(2)
    programs = [Together(lower(steps), barrier) for steps in (LARGE, SMALL)]
    with ThreadPoolExecutor(2) as pool:
        large, small = pool.map(measure, programs)
    assert_has_its_original_compile_time(large, first)
    assert small.requests_hits_misses == (1, 1, 0)
    assert small.stored < large.stored
    assert small.stored <= small.seconds <= small.elapsed + small.events[SAVED]
