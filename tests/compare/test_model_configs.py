import pytest

from flowhn_jax.compare.model_configs import (
    NAMES,
    SIZES,
    model_config,
    model_configs,
    parse_names,
)
from flowhn_jax.config import BASELINES
from flowhn_jax.recipes import BEST, VARIANTS


def test_names():
    assert parse_names("all") == NAMES == (*VARIANTS, *BASELINES)
    assert parse_names("llama, fac_split") == ("llama", "fac_split")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("lama", r"must be all or names from no_split, .*, llama, .*falcon_h1, .*got 'lama'"),
        ("llama,", r"must be all or names from .*; got ''"),
        ("llama,llama", "must have each name once; got 'llama,llama'"),
    ],
)
def test_misspelt_models_are_refused(models, message):
    with pytest.raises(ValueError, match=message):
        parse_names(models)


def test_a_misspelt_size_is_refused():
    with pytest.raises(ValueError, match="--size must be one of tiny, 135m, 350m, 1b; got '2b'"):
        model_config("2b", "llama")


@pytest.mark.parametrize("size", SIZES)
def test_only_the_models_differ(size):
    """Tokens, data, optimizer and batches are equal."""
    configs = model_configs(size, NAMES)
    first = configs["no_split"]
    assert first.train.eval_windows == 0
    for name, config in configs.items():
        assert config.model.name == ("ae_split" if name == BEST else name)
        assert (config.train, config.data, config.mesh) == (first.train, first.data, first.mesh)
        for key in ("vocab_size", "context", "width", "dtype"):
            assert getattr(config.model, key) == getattr(first.model, key)


def test_context_and_batch_size_replace_the_recipes():
    config = model_config("tiny", "hymba", 64, 2)
    assert (config.model.context, config.train.batch_size) == (64, 2)
