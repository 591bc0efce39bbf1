"""The model families of Hugging Face's transformers: their configs and names, and ours.

A setting that only one side supports is refused by name.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from flowhn_jax import config as config_lib
from flowhn_jax.config import ModelConfig, Multipliers
from flowhn_jax.interop import names
from flowhn_jax.interop.json_types import check_types
from flowhn_jax.interop.layout import HEAD, Path, parse_path
from flowhn_jax.models.base import AttentionKeys, RotaryKeys, StateSpaceKeys
from flowhn_jax.models.falcon_h1 import FalconH1Config
from flowhn_jax.models.jamba import JambaConfig
from flowhn_jax.models.mamba import Mamba1Config, Mamba2Config
from flowhn_jax.utils.text import short_repr

Json = Mapping[str, Any]

_DEFAULT_CONTEXT = 1024  # if config.json has none, as for Mamba, which has no limit
_DEFAULT_ROPE_THETA = 10000.0  # if config.json has none, as for the first Llamas


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
      kind: our model.kind.
      architecture: their class.
      model: our paths by their names, outside the layers.
      layer: returns our paths by their names within layer i.
      read: returns keys of our model config, from theirs.
      write: returns keys of their config, from ours.
      supported: the values that we support, by their key, where they are not all.
      layers: prefix of their names within layers.
      is_tied: whether the head is the embedding if config.json has no tie_word_embeddings.
    """

    kind: str
    architecture: str
    model: Mapping[str, str]
    layer: Callable[[Any, int], Mapping[str, str]]
    read: Callable[[Json], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    supported: Mapping[str, tuple[Any, ...]]
    layers: str = "model.layers"
    is_tied: bool = False

    def names(self, config: ModelConfig) -> dict[str, Path]:
        """Return the path of each of our parameters, by their name."""
        found = dict(self.model)
        for index in range(config.blocks):
            for theirs, ours in self.layer(config, index).items():
                found[f"{self.layers}.{index}.{theirs}"] = f"blocks/{index}/{ours}"
        paths = {theirs: parse_path(ours) for theirs, ours in found.items()}
        return {
            theirs: path
            for theirs, path in paths.items()
            if not (config.tie_embeddings and path == HEAD)
        }


def to_config(hf_config: Json) -> tuple[Family, ModelConfig]:
    """Return the family and our config for a config.json.

    Raises:
      ValueError: its `model_type` or another value is not supported, or a key is missing.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type must be one of {', '.join(FAMILIES)}; got "
            f"{short_repr(model_type)}."
        )
    check_types(hf_config)
    family = FAMILIES[model_type]
    refused = [
        f"{key} must be {' or '.join(map(repr, supported))}, got {short_repr(hf_config[key])}"
        for key, supported in {**_SUPPORTED, **family.supported}.items()
        if key in hf_config and _comparable(hf_config[key]) not in supported
    ]
    if refused:
        raise ValueError(f"config.json of {model_type}: {'; '.join(refused)}.")
    try:
        keys = family.read(hf_config) | {
            "kind": family.kind,
            "vocab_size": hf_config["vocab_size"],
            "width": hf_config["hidden_size"],
            "blocks": hf_config["num_hidden_layers"],
            "context": hf_config.get("max_position_embeddings", _DEFAULT_CONTEXT),
            "init_std": hf_config.get("initializer_range", 0.02),
            "norm_eps": hf_config[_epsilon(family.kind)],
            "tie_embeddings": hf_config.get("tie_word_embeddings", family.is_tied),
        }
    except KeyError as error:
        raise ValueError(f"config.json of {model_type} must have {error}.") from error
    return family, config_lib.parse({"model": keys}).model


def to_json(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """Return the family and the config.json for our config.

    Raises:
      ValueError: transformers has no such model.
    """
    found = [item for item in FAMILIES.items() if item[1].kind == config.kind]
    if not found:
        raise ValueError(f"transformers has no model of model.kind = {config.kind!r}.")
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
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        **family.write(config),
    }


def _epsilon(kind: str) -> str:
    return "layer_norm_epsilon" if kind in ("mamba1", "mamba2") else "rms_norm_eps"


_UNLIMITED = (0.0, math.inf)
_SUPPORTED = {  # in all families
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "is_causal": (True,),
    "per_layer_config": (None,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}


def _comparable(value: Any) -> Any:
    """Return a limit of time steps, which JSON can spell in several ways, as floats."""
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


def _write_attention(config: AttentionKeys) -> dict[str, Any]:
    return {
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_width,
    }


def _read_rope(hf: Json) -> dict[str, Any]:
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


def _write_rope(config: RotaryKeys) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"}}


# Their keys of the state size, the taps of the convolution, and inner width / width.
_MAMBA_KEYS = "state_size", "conv_kernel", "expand"
_JAMBA_KEYS = "mamba_d_state", "mamba_d_conv", "mamba_expand"


def _read_ssm(hf: Json, keys: tuple[str, str, str]) -> dict[str, Any]:
    state, taps, expand = keys
    return {"ssm_state": hf[state], "ssm_conv": hf[taps], "ssm_expand": hf[expand]}


def _write_ssm(config: StateSpaceKeys, keys: tuple[str, str, str]) -> dict[str, Any]:
    if config.ssm_expand != int(config.ssm_expand):
        raise ValueError(
            f"model.ssm_expand must be an integer for {config.kind} in transformers; got "
            f"{config.ssm_expand}."
        )
    state, taps, expand = keys
    return {state: config.ssm_state, taps: config.ssm_conv, expand: int(config.ssm_expand)}


def _read_rank(value: Any) -> Any:
    return None if value == "auto" else value


def _read_mamba1(hf: Json) -> dict[str, Any]:
    return _read_ssm(hf, _MAMBA_KEYS) | {"ssm_dt_rank": _read_rank(hf["time_step_rank"])}


def _write_mamba1(config: Mamba1Config) -> dict[str, Any]:
    return {
        **_write_ssm(config, _MAMBA_KEYS),
        "intermediate_size": config.inner,
        "time_step_rank": config.dt_rank,
        "use_bias": False,
        "use_conv_bias": True,
    }


def _read_mamba2(hf: Json) -> dict[str, Any]:
    inner = hf["expand"] * hf["hidden_size"]
    if hf["head_dim"] is None or hf["num_heads"] * hf["head_dim"] != inner:
        raise ValueError(
            f"config.json: num_heads * head_dim must be expand * hidden_size = {inner}; got "
            f"{hf['num_heads']} * {hf['head_dim']}."
        )
    heads = {"ssm_head_dim": hf["head_dim"], "ssm_groups": hf["n_groups"]}
    return _read_ssm(hf, _MAMBA_KEYS) | heads


def _write_mamba2(config: Mamba2Config) -> dict[str, Any]:
    return {
        **_write_ssm(config, _MAMBA_KEYS),
        "num_heads": config.ssm_heads,
        "head_dim": config.ssm_head_dim,
        "n_groups": config.ssm_groups,
        "use_bias": False,
        "use_conv_bias": True,
    }


def _read_jamba(hf: Json) -> dict[str, Any]:
    return {
        **_read_attention(hf),
        "attention_period": hf["attn_layer_period"],
        "attention_offset": hf["attn_layer_offset"],
        **_read_ssm(hf, _JAMBA_KEYS),
        "ssm_dt_rank": _read_rank(hf["mamba_dt_rank"]),
    }


def _write_jamba(config: JambaConfig) -> dict[str, Any]:
    return {
        **_write_attention(config),
        "attn_layer_period": config.attention_period,
        "attn_layer_offset": config.attention_offset,
        **_write_ssm(config, _JAMBA_KEYS),
        "mamba_dt_rank": config.dt_rank,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
    }


def _jamba_layer(config: JambaConfig, index: int) -> dict[str, str]:
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
            f"config.json: mamba_d_head must be mamba_d_ssm / mamba_n_heads = {head_dim:g}; got "
            f"{short_repr(hf['mamba_d_head'])}."
        )
    factors = {ours: hf.get(theirs) for ours, theirs in _FACTORS.items()}
    for theirs, ours in (("ssm_multipliers", _SSM_FACTORS), ("mlp_multipliers", _MLP_FACTORS)):
        found = hf.get(theirs) or [None] * len(ours)
        if len(found) != len(ours):
            raise ValueError(
                f"config.json: {theirs} must have {len(ours)} values; got {short_repr(found)}."
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


def _write_falcon_h1(config: FalconH1Config) -> dict[str, Any]:
    factors: Multipliers = config.multipliers
    return (
        _write_attention(config)
        | _write_rope(config)
        | {theirs: getattr(factors, ours) for ours, theirs in _FACTORS.items()}
        | {
            "ssm_multipliers": [getattr(factors, name) for name in _SSM_FACTORS],
            "mlp_multipliers": [getattr(factors, name) for name in _MLP_FACTORS],
            "mamba_d_ssm": config.inner,
            "mamba_n_heads": config.ssm_heads,
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
        layer=lambda config, index: names.LLAMA_LAYER,
        read=lambda hf: _read_attention(hf) | _read_rope(hf),
        write=lambda config: _write_attention(config) | _write_rope(config),
        supported={},
    ),
    "mamba": Family(
        kind="mamba1",
        architecture="MambaForCausalLM",
        model=names.MAMBA_MODEL,
        layers="backbone.layers",
        layer=lambda config, index: names.MAMBA1_LAYER,
        read=_read_mamba1,
        write=_write_mamba1,
        supported=_PLAIN_MAMBA,
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
        supported=_PLAIN_MAMBA,
    ),
    "jamba": Family(
        kind="jamba",
        architecture="JambaForCausalLM",
        model=names.JAMBA_MODEL,
        layer=_jamba_layer,
        read=_read_jamba,
        write=_write_jamba,
        supported={
            "num_experts": (1,),
            "mamba_conv_bias": (True,),
            "mamba_proj_bias": (False,),
        },
    ),
    "falcon_h1": Family(
        kind="falcon_h1",
        architecture="FalconH1ForCausalLM",
        model=names.JAMBA_MODEL,
        layer=lambda config, index: names.FALCON_H1_LAYER,
        read=_read_falcon_h1,
        write=_write_falcon_h1,
        supported={
            "mamba_rms_norm": (False,),
            "mamba_conv_bias": (True,),
            "mamba_proj_bias": (False,),
            "projectors_bias": (False,),
            "time_step_limit": (_UNLIMITED,),
        },
    ),
}
