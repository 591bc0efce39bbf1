"""A model family and a mixer of one file each: registered, configured, trained and decoded."""

import dataclasses
import pathlib
import shutil
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowhn_jax import config as config_lib
from flowhn_jax import flops, models
from flowhn_jax.checkpoints.workdir import read_config
from flowhn_jax.data.prepare import prepare
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.layers.linear import linear
from flowhn_jax.layers.prompts import Prompts, where_active
from flowhn_jax.models import registry
from flowhn_jax.models.base import ModelConfig
from flowhn_jax.models.language_model import LanguageModel
from flowhn_jax.training import metrics
from flowhn_jax.training.trainer import fit

TEXT = pathlib.Path(__file__).parent.parent / "data" / "wikitext.txt"


class AverageCache(NamedTuple):
    """The average so far, [B, E] float32."""

    average: jax.Array


class MovingAverage(nnx.Module):
    """A mixer: exponential moving averages of E channels, each with a learned rate."""

    def __init__(self, width: int, inner: int, context: LayerContext):
        self.inner = inner
        self.in_proj = linear(width, inner, context)
        self.a_log = nnx.Param(jnp.zeros(inner))
        self.out_proj = linear(inner, width, context)

    def __call__(self, x, segment_ids=None):
        """Return the mixed tokens [B, T, D]."""
        averages = self._averages(x, segment_ids)
        return self.out_proj(averages.astype(x.dtype))

    def prefill(self, x, prompts: Prompts, length: int):
        """Return the mixed tokens [B, T, D], and the cache after each row's tokens."""
        del length
        averages = self._averages(x, prompts.segment_ids)
        last = prompts.reset_state(prompts.last(averages))
        return self.out_proj(averages.astype(x.dtype)), AverageCache(last)

    def init_cache(self, batch: int, length: int) -> AverageCache:
        """Return the cache before the first token."""
        del length
        return AverageCache(jnp.zeros((batch, self.inner)))

    def step(self, x, cache: AverageCache, active=None):
        """Return the mixed token of each sequence [B, D], and the resulting cache."""
        average = self._update(cache.average, self.in_proj(x))
        new_cache = where_active(active, AverageCache(average), cache)
        return self.out_proj(average.astype(x.dtype)), new_cache

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """Return the FLOPs of the averages."""
        del causal
        return 3 * tokens * self.inner

    def _update(self, average, u):
        rate = jax.nn.sigmoid(self.a_log[...])
        return rate * average + (1 - rate) * u.astype(jnp.float32)

    def _averages(self, x, segment_ids):
        u = self.in_proj(x)
        starts = jnp.zeros(u.shape[:2], bool)
        if segment_ids is not None:
            starts = starts.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])

        def update(average, inputs):
            u, starts = inputs
            average = self._update(jnp.where(starts[:, None], 0, average), u)
            return average, average

        first = self.init_cache(x.shape[0], 0).average
        over_tokens = jnp.moveaxis(u, 1, 0), starts.T
        return jnp.moveaxis(jax.lax.scan(update, first, over_tokens)[1], 0, 1)


@dataclasses.dataclass(frozen=True)
class AverageConfig(ModelConfig):
    """What the new family reads.

    Attributes:
      average_channels: E, channels of the averages.
    """

    kind: ClassVar[str] = "average"

    average_channels: int = 32


class AverageModel(LanguageModel):
    """A stack of moving averages without MLPs."""

    config: AverageConfig

    def make_block(self, index: int, context: LayerContext) -> DecoderLayer[AverageCache]:
        """Return a layer; all are alike."""
        del index
        mixer = MovingAverage(self.config.width, self.config.average_channels, context)
        return DecoderLayer(mixer, self.config.width, 0, context)


@pytest.fixture
def family(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    registry.register(AverageConfig)(AverageModel)


SIZES = {"vocab_size": 257, "context": 24, "width": 16, "dtype": "float32", "init_std": 0.2}


def test_a_new_family_has_keys_of_its_own(family):
    assert "model.average_channels" in config_lib.describe_keys()
    recipe = config_lib.default()
    recipe.model.kind, recipe.model.average_channels = "average", 8
    config = config_lib.parse(recipe)
    assert config.model == AverageConfig(average_channels=8)
    assert config_lib.parse(config_lib.to_dict(config)) == config
    with pytest.raises(ValueError, match=r"heads must be its default, 32, for .*'average'.*got 2"):
        config_lib.parse({"model": {"kind": "average", "heads": 2}})
    with pytest.raises(ValueError, match=r"average_channels must be .* 'flowhn'.*; got 8"):
        config_lib.parse({"model": {"average_channels": 8}})


def test_a_new_family_trains(family, tmp_path):
    shutil.copy(TEXT, tmp_path / "text.txt")
    prepare(str(tmp_path / "text.txt"), "bytes", str(tmp_path / "set"), context=24)
    keys = {
        "model": {"kind": "average"} | SIZES,
        "data": {"path": str(tmp_path / "set")},
        "train": {"steps": 2, "log_every": 1, "eval_windows": 8},
        "mesh": {"data": 1},
    }
    config = config_lib.parse(keys)
    assert fit(config, str(tmp_path / "run"))
    assert read_config(str(tmp_path / "run")) == config
    assert [row["step"] for row in metrics.read_rows(tmp_path / "run")] == [1, 2]


def test_steps_of_a_new_mixer_match_one_pass(family, rng):
    config = config_lib.parse({"model": {"kind": "average"} | SIZES}).model
    params = models.init(config, jax.random.key(0))
    tokens = rng.integers(0, config.vocab_size, (2, 9))
    expected = models.forward(config, params, tokens)
    logits, cache = models.prefill(config, params, tokens[:, :8], length=9)
    np.testing.assert_allclose(logits, expected[:, 7], atol=1e-5)
    logits, _ = models.step(config, params, tokens[:, 8], cache)
    np.testing.assert_allclose(logits, expected[:, 8], atol=1e-5)
    products = 2 * config.width * (config.blocks * 2 * 32 + config.vocab_size)
    assert flops.forward_flops(config, 9) == 9 * (products + config.blocks * 3 * 32)


def test_a_family_cannot_change_what_others_have(family):
    with pytest.raises(ValueError, match="'average' is already registered"):
        registry.register(AverageConfig)(AverageModel)

    @dataclasses.dataclass(frozen=True)
    class OtherConfig(ModelConfig):
        kind: ClassVar[str] = "other"
        heads: int = 3

    with pytest.raises(ValueError, match=r"model.heads must have the default 32 .* has 3"):
        registry.register(OtherConfig)(AverageModel)
