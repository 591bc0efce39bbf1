"""Llama, Mistral, Qwen2 and Qwen3 in transformers."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flowhn_jax.interop import names
from flowhn_jax.interop.families.attention import BIASES, read_attention, write_attention
from flowhn_jax.interop.families.family import Family, Json
from flowhn_jax.interop.families.rotary import read_rope, write_rope
from flowhn_jax.models.llama import LlamaConfig
from flowhn_jax.utils.text import short_repr

_NO_WINDOWS = {"use_sliding_window": False, "sliding_window": None}


def _read(hf: Json) -> dict[str, Any]:
    return read_attention(hf) | read_rope(hf)


def _read_llama(hf: Json) -> dict[str, Any]:
    bias = "all" if hf.get("attention_bias") else "none"
    return _read(hf) | {"attention_bias": bias, "mlp_bias": bool(hf.get("mlp_bias"))}


def _read_qwen2(hf: Json) -> dict[str, Any]:
    _refuse_windows(hf)
    return _read(hf) | {"attention_bias": "qkv"}


def _read_qwen3(hf: Json) -> dict[str, Any]:
    _refuse_windows(hf)
    _require(hf, "head_dim")  # transformers' default is 128, whatever the width
    bias = "all" if hf.get("attention_bias") else "none"
    return _read(hf) | {"attention_bias": bias, "qk_norm": True}


def _read_mistral(hf: Json) -> dict[str, Any]:
    # transformers' defaults are 8 heads and windows of 4,096 tokens.
    _require(hf, "num_key_value_heads", "sliding_window")
    return _read(hf)


def _require(hf: Json, *keys: str) -> None:
    """Raise KeyError if config.json lacks a key whose default does not follow from the others."""
    for key in keys:
        hf[key]


def _refuse_windows(hf: Json) -> None:
    """Raise ValueError if a layer attends in a sliding window.

    It does by `layer_types`, or else by the keys that the message names and `sliding_window`.
    """
    kinds = hf.get("layer_types")
    if kinds is None:
        size = hf.get("sliding_window", 4096)  # the default of transformers
        windows = hf.get("use_sliding_window") and size is not None
        last = hf["num_hidden_layers"] - 1
        kinds = ["sliding_attention"] if windows and last >= hf["max_window_layers"] else []
    found = [kind for kind in kinds if kind != "full_attention"]
    if found:
        raise ValueError(
            "config.json: layer_types, or use_sliding_window and max_window_layers, must give "
            f"'full_attention' to all layers; got {short_repr(found[0])}."
        )


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_attention(config) | write_rope(config)


def _write_llama(config: LlamaConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.attention_bias == "all", "mlp_bias": config.mlp_bias}
    return _write(config) | biases


def _write_qwen2(config: LlamaConfig) -> dict[str, Any]:
    return _write(config) | _NO_WINDOWS


def _write_qwen3(config: LlamaConfig) -> dict[str, Any]:
    return _write(config) | _NO_WINDOWS | {"attention_bias": config.attention_bias == "all"}


LLAMA = Family(
    kind="llama",
    architecture="LlamaForCausalLM",
    model=names.LLAMA_MODEL,
    layer=lambda config, index: names.LLAMA_LAYER,
    read=_read_llama,
    write=_write_llama,
    can_write=lambda config: config.attention_bias != "qkv" and not config.qk_norm,
    supported=BIASES,
)

MISTRAL = dataclasses.replace(
    LLAMA,
    architecture="MistralForCausalLM",
    read=_read_mistral,
    write=_write,
    can_write=lambda config: False,  # as Llama, which has the same layers
    supported={},
)


def _qwen(
    number: int,
    read: Callable[[Json], dict[str, Any]],
    write: Callable[[LlamaConfig], dict[str, Any]],
    can_write: Callable[[LlamaConfig], bool],
) -> Family:
    """Return a generation of Qwen; no layer may have a window."""
    return dataclasses.replace(
        LLAMA,
        architecture=f"Qwen{number}ForCausalLM",
        read=read,
        write=write,
        can_write=can_write,
        supported={"attention_bias": BIASES["attention_bias"], "sliding_window": None},
    )


QWEN2 = _qwen(
    2,
    _read_qwen2,
    _write_qwen2,
    lambda config: config.attention_bias == "qkv" and not (config.qk_norm or config.mlp_bias),
)
QWEN3 = _qwen(
    3,
    _read_qwen3,
    _write_qwen3,
    lambda config: config.qk_norm and config.attention_bias != "qkv" and not config.mlp_bias,
)
