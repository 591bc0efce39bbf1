"""Falcon-H1 in transformers."""

from typing import Any

from flowhn_jax.config import Multipliers
from flowhn_jax.interop import names
from flowhn_jax.interop.families.attention import BIASES, read_attention, write_attention
from flowhn_jax.interop.families.family import Family, Json
from flowhn_jax.interop.families.rotary import read_rope, write_rope
from flowhn_jax.interop.families.state_space import read_limits, write_limits
from flowhn_jax.models.falcon_h1 import FalconH1Config
from flowhn_jax.utils.text import short_repr

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
        read_attention(hf)
        | read_rope(hf)
        | read_limits(hf)
        | {
            "ssm_state": hf["mamba_d_state"],
            "ssm_conv": hf["mamba_d_conv"],
            "ssm_expand": inner / hf["hidden_size"],
            "ssm_head_dim": inner // hf["mamba_n_heads"],
            "ssm_groups": hf["mamba_n_groups"],
            "ssm_conv_bias": hf.get("mamba_conv_bias", True),
            "ssm_in_bias": hf.get("mamba_proj_bias", False),
            "ssm_out_bias": hf.get("projectors_bias", False),
            "ssm_gated_norm": _read_gated_norm(hf),
            "attention_bias": "all" if hf.get("attention_bias") else "none",
            "mlp_bias": bool(hf.get("mlp_bias")),
            "multipliers": {ours: x for ours, x in factors.items() if x is not None},
        }
    )


def _read_gated_norm(hf: Json) -> str:
    if not hf.get("mamba_rms_norm", False):
        return "none"
    return "before_gate" if hf.get("mamba_norm_before_gate", True) else "after_gate"


def _write_falcon_h1(config: FalconH1Config) -> dict[str, Any]:
    factors: Multipliers = config.multipliers
    return (
        write_attention(config)
        | write_rope(config)
        | write_limits(config)
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
            "mamba_conv_bias": config.ssm_conv_bias,
            "mamba_proj_bias": config.ssm_in_bias,
            "projectors_bias": config.ssm_out_bias,
            "mamba_rms_norm": config.ssm_gated_norm != "none",
            "mamba_norm_before_gate": config.ssm_gated_norm == "before_gate",
            "attention_bias": config.attention_bias == "all",
            "mlp_bias": config.mlp_bias,
        }
    )


FAMILY = Family(
    kind="falcon_h1",
    architecture="FalconH1ForCausalLM",
    model=names.JAMBA_MODEL,
    layer=lambda config, index: names.FALCON_H1_LAYER,
    read=_read_falcon_h1,
    write=_write_falcon_h1,
    can_write=lambda config: config.attention_bias != "qkv",
    supported=BIASES,
)
