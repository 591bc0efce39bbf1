import numpy as np
import pytest


@pytest.fixture
def rng():
    """Fresh random numbers in every run; a failure shows the seed."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)
