"""Mamba and Mamba-2 in transformers."""

from typing import Any

from flowhn_jax.interop import names
from flowhn_jax.interop.families.family import Family, Json
from flowhn_jax.interop.families.state_space import (
    MAMBA_KEYS,
    UNLIMITED,
    read_rank,
    read_ssm,
    write_ssm,
)
from flowhn_jax.models.mamba import Mamba1Config, Mamba2Config


def _read_mamba1(hf: Json) -> dict[str, Any]:
    return read_ssm(hf, MAMBA_KEYS) | {"ssm_dt_rank": read_rank(hf["time_step_rank"])}


def _write_mamba1(config: Mamba1Config) -> dict[str, Any]:
    return {
        **write_ssm(config, MAMBA_KEYS),
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
    return read_ssm(hf, MAMBA_KEYS) | heads


def _write_mamba2(config: Mamba2Config) -> dict[str, Any]:
    return {
        **write_ssm(config, MAMBA_KEYS),
        "num_heads": config.ssm_heads,
        "head_dim": config.ssm_head_dim,
        "n_groups": config.ssm_groups,
        "use_bias": False,
        "use_conv_bias": True,
    }


_PLAIN_MAMBA = {"use_bias": (False,), "use_conv_bias": (True,), "time_step_limit": (UNLIMITED,)}

MAMBA = Family(
    kind="mamba1",
    architecture="MambaForCausalLM",
    model=names.MAMBA_MODEL,
    layers="backbone.layers",
    layer=lambda config, index: names.MAMBA1_LAYER,
    read=_read_mamba1,
    write=_write_mamba1,
    supported=_PLAIN_MAMBA,
    is_tied=True,
)

MAMBA2 = Family(
    kind="mamba2",
    architecture="Mamba2ForCausalLM",
    model=names.MAMBA_MODEL,
    layers="backbone.layers",
    layer=lambda config, index: names.MAMBA2_LAYER,
    read=_read_mamba2,
    write=_write_mamba2,
    supported=_PLAIN_MAMBA,
)
