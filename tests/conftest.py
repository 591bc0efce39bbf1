import os
import pathlib

# JAX reads these variables on import. Eight CPU devices let one process test one device and many.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests spend far more time compiling than computing, so LLVM's optimizations are off.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# The tests compile the same small programs many times, in several processes.
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.storage.emulator import bucket, emulator  # noqa: E402, F401

hypothesis.settings.register_profile("ci", deadline=None, derandomize=False, max_examples=40)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="module")
def _drop_programs():
    """Drop a module's compiled programs: those of all modules would take 9 GiB."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng():
    """Return a generator with a fresh seed, which a failure prints."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)
