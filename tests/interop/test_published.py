"""Published models in small sizes against transformers, with random values of all parameters."""

import pytest

from tools.published import TOLERANCE, compare, published

MODELS = published()
FAST = {  # one per model_type, one of Mamba's authors without it, and one with biases everywhere
    **{model.config.get("model_type"): model.name for model in reversed(MODELS)},
    "biases": "granite-3b-code",
}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, id=model.name, marks=[] if is_fast else [pytest.mark.slow])
        for model in MODELS
        for is_fast in [model.name in FAST.values()]
    ],
)
def test_parity_with_transformers(model, tmp_path):
    """Logits, greedy text, the exported model's logits, and a train step."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    found = compare(model.config, tmp_path)
    assert found.error <= TOLERANCE
    assert found.same_text
    assert found.exported_error <= TOLERANCE
    assert found.trains, found
