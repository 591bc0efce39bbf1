"""The models that Hugging Face's transformers knows: their config.json and ours, and their names.

`read` gives the keys of our ModelConfig from theirs, `write` theirs from ours; what either has and
the other cannot say is refused by name.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from flowhn_jax import config as config_lib
from flowhn_jax.config import ModelConfig, Multipliers
from flowhn_jax.interop import names
from flowhn_jax.interop.json_types import check_types
from flowhn_jax.interop.layout import Path, parse_path
from flowhn_jax.utils.text import short_repr

Json = Mapping[str, Any]

_DEFAULT_CONTEXT = 1024  # where config.json has none, as for Mamba, which knows no limit
_ROPE_THETA = 10000.0  # where config.json has none, as for the first Llamas


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`."""

    kind: str  # our model.kind
    architecture: str  # their class
    model: Mapping[str, str]  # their names outside the layers -> our paths
    layers: str  # what their names within layers begin with
    layer: Callable[[ModelConfig, int], Mapping[str, str]]  # names within layer i -> our paths
    read: Callable[[Json], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    only: Mapping[str, tuple[Any, ...]]  # their keys of which we have these values alone
    is_tied: bool = False  # whether the head is the embedding where config.json does not say

    def names(self, config: ModelConfig) -> dict[str, Path]:
        """Their name of each parameter -> its path in ours."""
        found = dict(self.model)
        for index in range(config.blocks):
            for theirs, ours in self.layer(config, index).items():
                found[f"{self.layers}.{index}.{theirs}"] = f"blocks/{index}/{ours}"
        return {theirs: parse_path(ours) for theirs, ours in found.items()}


def to_config(hf_config: Json) -> tuple[Family, ModelConfig]:
    """Our config of a config.json.

    Raises:
      ValueError: a `model_type` or a value that we do not have, or a key that is missing.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"config.json has model_type {short_repr(model_type)}; accepted are {', '.join(FAMILIES)}."
        )
    check_types(hf_config)
    family = FAMILIES[model_type]
    refused = [
        f"{key} = {short_repr(hf_config[key])} (accepted: {' or '.join(map(repr, accepted))})"
        for key, accepted in (_EVERYWHERE | family.only).items()
        if key in hf_config and _plain(hf_config[key]) not in accepted
    ]
    if refused:
        raise ValueError(f"config.json of {model_type} has what we do not: {'; '.join(refused)}.")
    try:
        keys = family.read(hf_config) | {
            "kind": family.kind,
            "vocab_size": hf_config["vocab_size"],
            "width": hf_config["hidden_size"],
            "blocks": hf_config["num_hidden_layers"],
            "context": hf_config.get("max_position_embeddings", _DEFAULT_CONTEXT),
            "init_std": hf_config.get("initializer_range", 0.02),
            "norm_eps": hf_config[_epsilon(family.kind)],
        }
    except KeyError as error:
        raise ValueError(f"config.json of {model_type} lacks {error}.") from error
    return family, config_lib.parse({"model": keys}).model


def to_json(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The config.json of our config.

    Raises:
      ValueError: transformers does not know such a model.
    """
    found = [item for item in FAMILIES.items() if item[1].kind == config.kind]
    if not found:
        raise ValueError(f"transformers knows no model.kind {config.kind!r}.")
    ((model_type, family),) = found
    return family, {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.blocks,
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        _epsilon(config.kind): config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **family.write(config),
    }


def _epsilon(kind: str) -> str:
    return "layer_norm_epsilon" if kind in ("mamba1", "mamba2") else "rms_norm_eps"


_UNLIMITED = (0.0, math.inf)
_EVERYWHERE = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "is_causal": (True,),
    "per_layer_config": (None,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}


def _plain(value: Any) -> Any:
    """A limit of time steps, which JSON can write in several ways, in one; other values as is."""
    if isinstance(value, list | tuple) and len(value) == 2:
        infinite = (math.inf, "Infinity", "inf", {"__float__": "Infinity"})
        return value[0], math.inf if value[1] in infinite else value[1]
    return value


def _read_attention(hf: Json) -> dict[str, Any]:
    heads = hf["num_attention_heads"]
    size = hf.get("head_dim") or hf["hidden_size"] // heads
    return {
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": None if size * heads == hf["hidden_size"] else size,
        "mlp_width": hf["intermediate_size"],
    }


def _write_attention(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dims.head_dim,
        "intermediate_size": config.mlp_width,
    }


def _read_rope(hf: Json) -> dict[str, Any]:
    """From `rope_parameters`, or `rope_scaling` and `type`, its names before transformers 5."""
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"config.json has rotary positions of its own for {short_repr(nested[0])}; accepted is one "
            "rope_theta for all layers."
        )
    rope = {**hf, **given}
    found = rope.get("rope_type", rope.get("type", "default"))
    if found != "default":
        raise ValueError(f"config.json has rope_type = {short_repr(found)}; accepted is 'default'.")
    return {"rope_theta": rope.get("rope_theta", _ROPE_THETA)}


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"}}


def _rank(value: int | str) -> int | None:
    return None if value == "auto" else value


def _read_mamba1(hf: Json) -> dict[str, Any]:
    return {
        "ssm_state": hf["state_size"],
        "ssm_conv": hf["conv_kernel"],
        "ssm_expand": hf["expand"],
        "ssm_dt_rank": _rank(hf["time_step_rank"]),
    }


def _write_mamba1(config: ModelConfig) -> dict[str, Any]:
    return {
        "state_size": config.ssm_state,
        "conv_kernel": config.ssm_conv,
        "expand": _whole_expand(config),
        "intermediate_size": config.inner,
        "time_step_rank": config.dims.dt_rank,
        "use_bias": False,
        "use_conv_bias": True,
    }


def _whole_expand(config: ModelConfig) -> int:
    if config.ssm_expand != int(config.ssm_expand):
        raise ValueError(
            f"transformers has no {config.kind} with model.ssm_expand = {config.ssm_expand}; "
            "accepted is a whole number."
        )
    return int(config.ssm_expand)


def _read_mamba2(hf: Json) -> dict[str, Any]:
    inner = hf["expand"] * hf["hidden_size"]
    if hf["head_dim"] is None or hf["num_heads"] * hf["head_dim"] != inner:
        raise ValueError(
            f"config.json has num_heads {hf['num_heads']} x head_dim {hf['head_dim']}; accepted is "
            f"expand x hidden_size = {inner}."
        )
    return {
        "ssm_state": hf["state_size"],
        "ssm_conv": hf["conv_kernel"],
        "ssm_expand": hf["expand"],
        "ssm_head_dim": hf["head_dim"],
        "ssm_groups": hf["n_groups"],
    }


def _write_mamba2(config: ModelConfig) -> dict[str, Any]:
    return {
        "state_size": config.ssm_state,
        "conv_kernel": config.ssm_conv,
        "expand": _whole_expand(config),
        "num_heads": config.dims.ssm_heads,
        "head_dim": config.ssm_head_dim,
        "n_groups": config.ssm_groups,
        "use_bias": False,
        "use_conv_bias": True,
    }


def _read_jamba(hf: Json) -> dict[str, Any]:
    return _read_attention(hf) | {
        "attention_period": hf["attn_layer_period"],
        "attention_offset": hf["attn_layer_offset"],
        "ssm_state": hf["mamba_d_state"],
        "ssm_conv": hf["mamba_d_conv"],
        "ssm_expand": hf["mamba_expand"],
        "ssm_dt_rank": _rank(hf["mamba_dt_rank"]),
    }


def _write_jamba(config: ModelConfig) -> dict[str, Any]:
    return _write_attention(config) | {
        "attn_layer_period": config.attention_period,
        "attn_layer_offset": config.attention_offset,
        "mamba_d_state": config.ssm_state,
        "mamba_d_conv": config.ssm_conv,
        "mamba_expand": _whole_expand(config),
        "mamba_dt_rank": config.dims.dt_rank,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
    }


def _jamba_layer(config: ModelConfig, index: int) -> dict[str, str]:
    attends = index % config.attention_period == config.attention_offset
    mixer = names.ATTENTION if attends else names.MAMBA1
    return mixer | names.FEED_FORWARD | names.NORMS


_SSM_FACTORS = "ssm_z", "ssm_x", "ssm_b", "ssm_c", "ssm_dt"
_MLP_FACTORS = "mlp_gate", "mlp_down"
_FACTORS = {
    "embedding": "embedding_multiplier",
    "head": "lm_head_multiplier",
    "attention_in": "attention_in_multiplier",
    "attention_out": "attention_out_multiplier",
    "key": "key_multiplier",
    "ssm_in": "ssm_in_multiplier",
    "ssm_out": "ssm_out_multiplier",
}


def _read_falcon_h1(hf: Json) -> dict[str, Any]:
    inner = hf.get("mamba_d_ssm") or hf["mamba_expand"] * hf["hidden_size"]
    head_dim = inner / hf["mamba_n_heads"]
    if hf.get("mamba_d_head", "auto") not in ("auto", head_dim):
        raise ValueError(
            f"config.json has mamba_d_head = {short_repr(hf['mamba_d_head'])}; accepted is mamba_d_ssm "
            f"/ mamba_n_heads = {head_dim:g}."
        )
    factors = {ours: hf.get(theirs) for ours, theirs in _FACTORS.items()}
    for theirs, ours in (("ssm_multipliers", _SSM_FACTORS), ("mlp_multipliers", _MLP_FACTORS)):
        found = hf.get(theirs) or [None] * len(ours)
        if len(found) != len(ours):
            raise ValueError(
                f"config.json has {theirs} = {short_repr(found)}; accepted are {len(ours)}."
            )
        factors |= dict(zip(ours, found, strict=True))
    return (
        _read_attention(hf)
        | _read_rope(hf)
        | {
            "ssm_state": hf["mamba_d_state"],
            "ssm_conv": hf["mamba_d_conv"],
            "ssm_expand": inner / hf["hidden_size"],
            "ssm_head_dim": inner // hf["mamba_n_heads"],
            "ssm_groups": hf["mamba_n_groups"],
            "multipliers": {ours: x for ours, x in factors.items() if x is not None},
        }
    )


def _write_falcon_h1(config: ModelConfig) -> dict[str, Any]:
    factors: Multipliers = config.multipliers
    return (
        _write_attention(config)
        | _write_rope(config)
        | {theirs: getattr(factors, ours) for ours, theirs in _FACTORS.items()}
        | {
            "ssm_multipliers": [getattr(factors, name) for name in _SSM_FACTORS],
            "mlp_multipliers": [getattr(factors, name) for name in _MLP_FACTORS],
            "mamba_d_ssm": config.inner,
            "mamba_n_heads": config.dims.ssm_heads,
            "mamba_d_head": config.ssm_head_dim,
            "mamba_n_groups": config.ssm_groups,
            "mamba_d_state": config.ssm_state,
            "mamba_d_conv": config.ssm_conv,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "mamba_rms_norm": False,
        }
    )


_PLAIN_MAMBA = {"use_bias": (False,), "use_conv_bias": (True,), "time_step_limit": (_UNLIMITED,)}

FAMILIES = {
    "llama": Family(
        kind="llama",
        architecture="LlamaForCausalLM",
        model=names.LLAMA_MODEL,
        layers="model.layers",
        layer=lambda config, index: names.LLAMA_LAYER,
        read=lambda hf: _read_attention(hf) | _read_rope(hf),
        write=lambda config: _write_attention(config) | _write_rope(config),
        only={},
    ),
    "mamba": Family(
        kind="mamba1",
        architecture="MambaForCausalLM",
        model=names.MAMBA_MODEL,
        layers="backbone.layers",
        layer=lambda config, index: names.MAMBA1_LAYER,
        read=_read_mamba1,
        write=_write_mamba1,
        only=_PLAIN_MAMBA,
        is_tied=True,
    ),
    "mamba2": Family(
        kind="mamba2",
        architecture="Mamba2ForCausalLM",
        model=names.MAMBA_MODEL,
        layers="backbone.layers",
        layer=lambda config, index: names.MAMBA2_LAYER,
        read=_read_mamba2,
        write=_write_mamba2,
        only=_PLAIN_MAMBA,
    ),
    "jamba": Family(
        kind="jamba",
        architecture="JambaForCausalLM",
        model=names.JAMBA_MODEL,
        layers="model.layers",
        layer=_jamba_layer,
        read=_read_jamba,
        write=_write_jamba,
        only={
            "num_experts": (1,),
            "mamba_conv_bias": (True,),
            "mamba_proj_bias": (False,),
        },
    ),
    "falcon_h1": Family(
        kind="falcon_h1",
        architecture="FalconH1ForCausalLM",
        model=names.JAMBA_MODEL,
        layers="model.layers",
        layer=lambda config, index: names.FALCON_H1_LAYER,
        read=_read_falcon_h1,
        write=_write_falcon_h1,
        only={
            "mamba_rms_norm": (False,),
            "mamba_conv_bias": (True,),
            "mamba_proj_bias": (False,),
            "projectors_bias": (False,),
            "time_step_limit": (_UNLIMITED,),
        },
    ),
}
