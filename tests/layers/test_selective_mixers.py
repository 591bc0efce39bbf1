"""Selective mixers have the outputs and caches of the whole mixer at the selected positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowhn_jax.layers.attention import Attention, AttentionSizes
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.mamba1 import Mamba1, Mamba1Sizes
from flowhn_jax.layers.mamba2 import Mamba2, Mamba2Sizes
from flowhn_jax.layers.prompts import make_prompts
from flowhn_jax.split import Selection, take

LENGTH = 11
SELECTION = Selection(4, ((0, 1), (2, 3)))
MIXERS = {
    "attention": lambda c: Attention(AttentionSizes(8, 4, 2, 4), c, rope_theta=20.0),
    "mamba1": lambda c: Mamba1(Mamba1Sizes(8, 12, 3, 4, 2), c),
    "mamba2": lambda c: Mamba2(Mamba2Sizes(8, 16, 3, 4, 4, 2), c),
}


@pytest.mark.parametrize("name", MIXERS)
def test_outputs_and_caches_are_those_of_all_tokens(name, rng):
    context = LayerContext(nnx.Rngs(int(rng.integers(2**31))), jnp.dtype("float32"), 0.5, 1e-6)
    mixer = MIXERS[name](context)
    x = jnp.asarray(rng.standard_normal((2, LENGTH, 8)), jnp.float32)
    segment_ids = jnp.asarray(np.sort(rng.integers(0, 2, (2, LENGTH)), axis=1))
    prompts = make_prompts(jnp.array([LENGTH, 5]), segment_ids)

    @jax.jit
    def both(x):
        whole, cache = mixer.prefill(x, prompts, LENGTH + 1)
        selected, other_cache = mixer.prefill_selected(x, prompts, LENGTH + 1, SELECTION)
        stepped, after = mixer.step(x[:, 0], cache)
        mix, other_after = mixer.read(x[:, 0], other_cache)
        plain = take(mixer(x, segment_ids), SELECTION)
        one = plain, take(whole, SELECTION), cache, stepped, after
        other = mixer.mix_selected(x, segment_ids, SELECTION), selected, other_cache, mix()
        return one, (*other, other_after)

    for expected, found in zip(*map(jax.tree.leaves, both(x)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))
