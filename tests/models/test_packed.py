"""A document has the same logits packed with others as alone, for every model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.config import BASELINES
from flowhn_jax.models.loss import loss_sum
from tests.slow import all_but
from tests.small import small_baseline, small_config

MODELS = {kind: small_baseline(kind) for kind in BASELINES} | {
    # Fewer and more meta tokens than taps.
    "hymba_one_meta_token": small_baseline("hymba", blocks=2, meta_tokens=1),
    "hymba_many_meta_tokens": small_baseline("hymba", blocks=2, meta_tokens=7),
    "no_split": small_config("no_split", model={"vocab_size": 61}).model,
    "no_split_mamba2": small_config(
        "no_split", model={"vocab_size": 61, "ssm": "mamba2", "ssm_head_dim": 8}
    ).model,
}
LENGTHS = 9, 2, 13  # of the documents of a row
every_model = pytest.mark.parametrize(
    "name", all_but(["llama", "mamba1", "mamba2", "hymba_many_meta_tokens", "no_split"], MODELS)
)


def packed(config, rng):
    """Return params, the documents' tokens, and the row that they make with its segment ids."""
    params = models.init(config, jax.random.key(int(rng.integers(2**31))))
    documents = [rng.integers(0, 61, (1, n)).astype(np.int32) for n in LENGTHS]
    segment_ids = np.repeat([[1, 2, 3]], LENGTHS, axis=1).astype(np.int32)
    return params, documents, np.concatenate(documents, axis=1), segment_ids


@every_model
def test_logits_match_the_documents_alone(name, rng):
    config = MODELS[name]
    params, documents, row, segment_ids = packed(config, rng)
    alone = [models.forward(config, params, tokens) for tokens in documents]
    together = models.forward(config, params, row, segment_ids)
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", all_but(["hymba_many_meta_tokens"], ["hymba_one_meta_token", "hymba_many_meta_tokens"])
)
def test_gradients_match_the_documents_alone(name, rng):
    config = MODELS[name]
    params, documents, row, segment_ids = packed(config, rng)

    def loss(params, tokens, ids):
        weights = np.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (0, 1))).astype(np.float32)
        batch = {
            "tokens": np.pad(tokens, ((0, 0), (0, 1))),
            "segment_ids": np.pad(ids, ((0, 0), (0, 1)), mode="edge"),
            "weights": weights,
        }
        return loss_sum(config, params, batch)

    def loss_alone(params):
        return sum(loss(params, tokens, np.ones_like(tokens)) for tokens in documents)

    expected = jax.jit(jax.grad(loss_alone))(params)
    found = jax.jit(jax.grad(lambda params: loss(params, row, segment_ids)))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)


@every_model
@pytest.mark.parametrize("cut", [10, 20])
def test_prompts_and_steps_continue_the_last_document(name, cut, rng):
    """The prompt ends within the second document, and 9 tokens into the third."""
    config = MODELS[name]
    params, documents, row, segment_ids = packed(config, rng)
    index = int(segment_ids[0, cut - 1]) - 1
    start = sum(LENGTHS[:index])
    rest = row[:, cut : start + LENGTHS[index]]
    alone = models.forward(config, params, documents[index])[0, cut - start - 1 :]
    logits, cache = models.prefill(
        config, params, row[:, :cut], segment_ids=segment_ids[:, :cut], length=row.shape[1]
    )
    found = [logits]
    for token in rest.T:
        logits, cache = models.step(config, params, token, cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found), alone, atol=5e-5, rtol=1e-5)
