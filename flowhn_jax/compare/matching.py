"""Baselines with as many FLOPs per token as a reference, from recipes with as many parameters."""

import dataclasses

from flowhn_jax import flops
from flowhn_jax.config import ModelConfig
from flowhn_jax.models.jamba import JambaConfig

_MLP_STEP = 8  # widths are multiples of it
_MLP_KEY = "mlp_width"


def match_flops(model: ModelConfig, reference: ModelConfig) -> ModelConfig:
    """Return a baseline with about as many FLOPs per token as the reference has.

    Embedding, width and head stay. The number of layers is scaled by the ratio of the FLOPs without
    the head and rounded. Then, if the model has MLPs, their width becomes the multiple of 8 with
    which the FLOPs come nearest. A Jamba with fewer layers than its period, of which none might
    attend, gets a period of all its layers and an offset at the same share of it.

    Args:
      model: the baseline with its recipe's sizes.
      reference: a config of the same width and vocabulary.
    """
    target = _forward(reference)
    head = 2 * model.width * model.vocab_size * model.context
    ratio = (target - head) / (_forward(model) - head)
    model = _with_blocks(model, max(1, round(model.blocks * ratio)))
    if not hasattr(model, _MLP_KEY):
        return model
    least = _with_mlp(model, _MLP_STEP)
    base = _forward(least)
    slope = _forward(_with_mlp(model, 2 * _MLP_STEP)) - base  # FLOPs are linear in the width
    return _with_mlp(model, _MLP_STEP * (1 + max(0, round((target - base) / slope))))


def _forward(model: ModelConfig) -> int:
    """Return the FLOPs of a forward pass over a context; training takes three times as many."""
    return flops.forward_flops(model, model.context)


def _with_mlp(model: ModelConfig, width: int) -> ModelConfig:
    return dataclasses.replace(model, **{_MLP_KEY: width})


def _with_blocks(model: ModelConfig, blocks: int) -> ModelConfig:
    if isinstance(model, JambaConfig) and blocks < model.attention_period:
        offset = model.attention_offset * blocks // model.attention_period
        return dataclasses.replace(
            model, blocks=blocks, attention_period=blocks, attention_offset=offset
        )
    return dataclasses.replace(model, blocks=blocks)
