"""The keys of attention and of rotary positions in config.json."""

from collections.abc import Mapping
from typing import Any

from flowhn_jax.interop.families.family import Json
from flowhn_jax.models.base import AttentionKeys, RotaryKeys
from flowhn_jax.utils.text import short_repr

_DEFAULT_ROPE_THETA = 10000.0  # if config.json has none, as for the first Llamas


def read_attention(hf: Json) -> dict[str, Any]:
    """Return the keys of an attention layer and its MLP."""
    heads = hf["num_attention_heads"]
    size = hf.get("head_dim") or hf["hidden_size"] // heads
    return {
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": None if size * heads == hf["hidden_size"] else size,
        "mlp_width": hf["intermediate_size"],
    }


def write_attention(config: AttentionKeys) -> dict[str, Any]:
    """Return their keys of an attention layer and its MLP."""
    return {
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_width,
    }


def read_rope(hf: Json) -> dict[str, Any]:
    """Read `rope_parameters`, or `rope_scaling`, its name before transformers 5."""
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            "config.json must have one rope_theta for all layers; it has separate ones for "
            f"{short_repr(nested[0])}."
        )
    rope = {**hf, **given}
    found = rope.get("rope_type", rope.get("type", "default"))
    if found != "default":
        raise ValueError(f"config.json: rope_type must be 'default'; got {short_repr(found)}.")
    return {"rope_theta": rope.get("rope_theta", _DEFAULT_ROPE_THETA)}


def write_rope(config: RotaryKeys) -> dict[str, Any]:
    """Return their keys of rotary positions."""
    return {"rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"}}
