"""Compile times of programs from the persistent cache."""

import concurrent.futures
import time

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
LARGE, SMALL = 300, 2
WHOLE_SECOND = 1.2


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
    """Return the seconds of compiling the large program, which is in the cache afterwards."""
    assert not any(cache.iterdir())
    _, seconds = compile_timed(lower(LARGE))
    assert seconds > 1.5 * WHOLE_SECOND
    assert any(cache.iterdir())
    return seconds


def test_a_program_from_the_cache_has_its_original_compile_time(first):
    lowered, start = lower(LARGE), time.perf_counter()
    compiled, second = compile_timed(lowered)
    elapsed = time.perf_counter() - start
    assert elapsed < first / 3
    assert first - WHOLE_SECOND < second < first + WHOLE_SECOND
    assert compiled(jnp.ones(2000)).shape == (2000 - LARGE + 1,)


def test_a_program_that_is_not_in_the_cache_has_the_elapsed_time(first):
    """Even if the thread has loaded a program from the cache before."""
    compile_timed(lower(LARGE))
    lowered, start = lower(SMALL), time.perf_counter()
    _, seconds = compile_timed(lowered)
    elapsed = time.perf_counter() - start
    assert 0.5 * elapsed < seconds <= elapsed


def test_each_thread_counts_only_its_programs(first):
    """A large and a small program are loaded from the cache at the same time."""
    compile_timed(lower(SMALL))
    lowered = [lower(LARGE), lower(SMALL)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        large, small = (seconds for _, seconds in pool.map(compile_timed, lowered))
    assert first - WHOLE_SECOND < large < first + WHOLE_SECOND
    assert small < first - WHOLE_SECOND
