import dataclasses

import pytest

from flowhn_jax import flops
from flowhn_jax.compare.matching import match_flops
from flowhn_jax.compare.model_configs import SIZES, model_config, model_configs
from flowhn_jax.config import BASELINES
from flowhn_jax.split import STRATEGIES
from tests.slow import all_but
from tests.small import small_baseline

TOLERANCE = 0.05  # as docs/guide/comparing.md states it
WITH_MLP = 0.002  # for the models whose MLPs can have any multiple of 8


CASES = [("tiny", ("mamba2", "jamba")), *((size, BASELINES) for size in SIZES)]


@pytest.mark.parametrize("case", all_but(CASES[:1], CASES), ids=str)
def test_baselines_have_the_flops_of_fac_split(case):
    size, names = case
    reference = model_config(size, "fac_split").model
    expected = flops.train_flops(reference, reference.context)
    for name, config in model_configs(size, names, match="flops").items():
        model, recipe = config.model, model_config(size, name).model
        ratio = flops.train_flops(model, model.context) / expected
        assert abs(ratio - 1) < (WITH_MLP if hasattr(model, "mlp_width") else TOLERANCE), name
        changed = {
            field.name
            for field in dataclasses.fields(model)
            if getattr(model, field.name) != getattr(recipe, field.name)
        }
        assert changed <= {"blocks", "mlp_width", "attention_period", "attention_offset"}, name


def test_the_strategies_and_sizes_by_parameters_are_unchanged():
    assert model_configs("tiny", STRATEGIES, match="flops") == model_configs("tiny", STRATEGIES)
    for name in BASELINES:
        assert model_config("tiny", name, match="params") == model_config("tiny", name)


def test_a_model_with_the_flops_of_the_reference_stays():
    """The rule finds the sizes that a reference of the same kind has."""
    for name in ("llama", "shm", "mamba1"):
        reference = small_baseline(name)
        assert match_flops(reference, reference) == reference
        larger = dataclasses.replace(reference, blocks=3 * reference.blocks)
        assert match_flops(larger, reference) == reference


@pytest.mark.parametrize("blocks", [1, 4, 7])
def test_a_small_jamba_has_one_attention_layer(blocks):
    recipe = small_baseline("jamba", blocks=8, attention_period=8, attention_offset=4)
    reference = dataclasses.replace(
        recipe, blocks=blocks, attention_period=blocks, attention_offset=blocks // 2
    )
    found = match_flops(recipe, reference)
    attends = [
        layer for layer in range(found.blocks)
        if layer % found.attention_period == found.attention_offset
    ]  # fmt: skip
    assert len(attends) == 1
    assert attends[0] == found.blocks // 2
    assert found.blocks == pytest.approx(blocks, abs=1)
