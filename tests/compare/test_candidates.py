import pytest

from flowhn_jax.compare.candidates import NAMES, SIZES, candidate, candidates, parse_names
from flowhn_jax.config import BASELINES
from flowhn_jax.split import STRATEGIES


def test_names():
    assert parse_names("all") == NAMES == STRATEGIES + BASELINES
    assert parse_names("llama, fac_split") == ("llama", "fac_split")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("lama", r"'lama'; accepted are all, or of no_split, .*fai_split, llama, .*falcon_h1"),
        ("llama,", r"has ''; accepted"),
        ("llama,llama", "accepted is each name once"),
    ],
)
def test_misspelt_models(models, message):
    with pytest.raises(ValueError, match=message):
        parse_names(models)


def test_misspelt_size():
    with pytest.raises(ValueError, match="'2b'; accepted are tiny, 135m, 350m, 1b"):
        candidate("2b", "llama", 0, None, None)


@pytest.mark.parametrize("size", SIZES)
def test_all_are_treated_alike(size):
    """Equal tokens, data, optimizer and batches; only the models differ."""
    configs = candidates(size, NAMES, train_tokens=1_000_000)
    first = configs["no_split"]
    tokens = first.train.steps * first.train.batch_size * first.model.context
    assert 1_000_000 <= tokens < 1_000_000 + first.train.batch_size * first.model.context
    for name, config in configs.items():
        assert config.model.name == name
        assert (config.train, config.data, config.mesh) == (first.train, first.data, first.mesh)
        for key in ("vocab_size", "context", "width", "dtype"):
            assert getattr(config.model, key) == getattr(first.model, key)


def test_other_sizes_of_the_batch():
    config = candidate("tiny", "hymba", 1000, 64, 2)
    assert (config.model.context, config.train.batch_size, config.train.steps) == (64, 2, 8)
