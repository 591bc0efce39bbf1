"""The keys of attention in config.json."""

from typing import Any

from flowhn_jax.interop.families.family import Json
from flowhn_jax.models.base import AttentionKeys

BIASES = {"attention_bias": (False, True), "mlp_bias": (False, True)}  # of `Family.supported`


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
