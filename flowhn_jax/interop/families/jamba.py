"""Jamba in transformers."""

from typing import Any

from flowhn_jax.interop import names
from flowhn_jax.interop.families.attention import read_attention, write_attention
from flowhn_jax.interop.families.family import Family, Json
from flowhn_jax.interop.families.state_space import (
    JAMBA_KEYS,
    read_rank,
    read_shared_bias,
    read_ssm,
    write_shared_bias,
    write_ssm,
)
from flowhn_jax.models.jamba import JambaConfig
from flowhn_jax.utils.text import short_repr

_BIASES = "mamba_conv_bias", "mamba_proj_bias"


def _read_jamba(hf: Json) -> dict[str, Any]:
    experts = hf.get("num_experts", 16)  # of Jamba v0.1, transformers' default
    if experts != 1:
        raise ValueError(
            f"config.json of jamba: num_experts must be 1, got {short_repr(experts)}. Mixtures of "
            "experts, such as Jamba v0.1, 1.5 and Mini, are not supported; the dense Jambas, such "
            "as AI21-Jamba-Reasoning-3B, are."
        )
    return {
        **read_attention(hf),
        "attention_period": hf["attn_layer_period"],
        "attention_offset": hf["attn_layer_offset"],
        **read_ssm(hf, JAMBA_KEYS),
        "ssm_dt_rank": read_rank(hf["mamba_dt_rank"]),
        **read_shared_bias(hf, *_BIASES),
    }


def _write_jamba(config: JambaConfig) -> dict[str, Any]:
    return {
        **write_attention(config),
        "attn_layer_period": config.attention_period,
        "attn_layer_offset": config.attention_offset,
        **write_ssm(config, JAMBA_KEYS),
        "mamba_dt_rank": config.dt_rank,
        **write_shared_bias(config, *_BIASES),
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
    }


def _jamba_layer(config: JambaConfig, index: int) -> dict[str, str]:
    mixer = names.ATTENTION if config.attends(index) else names.JAMBA_MAMBA1
    return mixer | names.FEED_FORWARD | names.NORMS


FAMILY = Family(
    kind="jamba",
    architecture="JambaForCausalLM",
    model=names.JAMBA_MODEL,
    layer=_jamba_layer,
    read=_read_jamba,
    write=_write_jamba,
    supported={},
)
