"""Mamba, Falcon Mamba and Mamba-2 in transformers."""

import dataclasses
from functools import partial
from typing import Any

from flowhn_jax.interop import names
from flowhn_jax.interop.families.family import Family, Json
from flowhn_jax.interop.families.state_space import (
    MAMBA_KEYS,
    UNLIMITED,
    read_limits,
    read_rank,
    read_shared_bias,
    read_ssm,
    write_limits,
    write_shared_bias,
    write_ssm,
)
from flowhn_jax.models.mamba import Mamba1Config, Mamba2Config

_BIASES = "use_conv_bias", "use_bias"
_DEFAULT_MIXER_EPS = 1e-6  # if config.json has none, as for the first Falcon Mambas


def _read_mamba1(hf: Json) -> dict[str, Any]:
    keys = read_ssm(hf, MAMBA_KEYS) | {"ssm_dt_rank": read_rank(hf["time_step_rank"])}
    # It takes precedence over `expand`, from which it differs in Falcon Mamba 7B.
    inner = hf.get("intermediate_size")
    if inner is not None:
        keys["ssm_expand"] = inner / hf["hidden_size"]
    return keys | read_shared_bias(hf, *_BIASES)


def _read_falcon_mamba(hf: Json) -> dict[str, Any]:
    return _read_mamba1(hf) | {"ssm_norm_eps": hf.get("mixer_rms_eps", _DEFAULT_MIXER_EPS)}


def _write_falcon_mamba(config: Mamba1Config) -> dict[str, Any]:
    return _write_mamba1(config) | {"mixer_rms_eps": config.ssm_norm_eps}


def _write_mamba1(config: Mamba1Config) -> dict[str, Any]:
    return {
        **write_ssm(config, MAMBA_KEYS),
        "intermediate_size": config.inner,
        "time_step_rank": config.dt_rank,
        **write_shared_bias(config, *_BIASES),
    }


def _read_mamba2(hf: Json) -> dict[str, Any]:
    inner = hf["expand"] * hf["hidden_size"]
    if hf["head_dim"] is None or hf["num_heads"] * hf["head_dim"] != inner:
        raise ValueError(
            f"config.json: num_heads * head_dim must be expand * hidden_size = {inner}; got "
            f"{hf['num_heads']} * {hf['head_dim']}."
        )
    heads = {"ssm_head_dim": hf["head_dim"], "ssm_groups": hf["n_groups"]}
    return read_ssm(hf, MAMBA_KEYS) | heads | read_limits(hf) | read_shared_bias(hf, *_BIASES)


def _write_mamba2(config: Mamba2Config) -> dict[str, Any]:
    return {
        **write_ssm(config, MAMBA_KEYS),
        "num_heads": config.ssm_heads,
        "head_dim": config.ssm_head_dim,
        "n_groups": config.ssm_groups,
        **write_limits(config),
        **write_shared_bias(config, *_BIASES),
    }


_family = partial(Family, model=names.MAMBA_MODEL, layers="backbone.layers")

MAMBA = _family(
    kind="mamba1",
    architecture="MambaForCausalLM",
    layer=lambda config, index: names.MAMBA1_LAYER,
    read=_read_mamba1,
    write=_write_mamba1,
    supported={"time_step_limit": (UNLIMITED,)},
    is_tied=True,
    can_write=lambda config: config.ssm_norm_eps is None,
)

FALCON_MAMBA = dataclasses.replace(
    MAMBA,
    architecture="FalconMambaForCausalLM",
    read=_read_falcon_mamba,
    write=_write_falcon_mamba,
    can_write=lambda config: config.ssm_norm_eps is not None,
)

MAMBA2 = _family(
    kind="mamba2",
    architecture="Mamba2ForCausalLM",
    layer=lambda config, index: names.MAMBA2_LAYER,
    read=_read_mamba2,
    write=_write_mamba2,
    supported={},
)
