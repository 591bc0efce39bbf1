"""The keys of state-space mixers in config.json."""

import math
from typing import Any

from flowhn_jax.interop.families.family import Json
from flowhn_jax.models.base import StateSpaceKeys
from flowhn_jax.models.published_keys import SSMBiasKeys, TimeStepLimitKeys
from flowhn_jax.utils.text import short_repr

UNLIMITED = (0.0, math.inf)  # time_step_limit
_INFINITE = math.inf, "Infinity", "inf", {"__float__": "Infinity"}  # as JSON spells it

# Their keys of the state size, the taps of the convolution, and inner width / width.
MAMBA_KEYS = "state_size", "conv_kernel", "expand"
JAMBA_KEYS = "mamba_d_state", "mamba_d_conv", "mamba_expand"


def read_ssm(hf: Json, keys: tuple[str, str, str]) -> dict[str, Any]:
    """Return the sizes of a mixer, given their names: `MAMBA_KEYS` or `JAMBA_KEYS`."""
    state, taps, expand = keys
    return {"ssm_state": hf[state], "ssm_conv": hf[taps], "ssm_expand": hf[expand]}


def write_ssm(config: StateSpaceKeys, keys: tuple[str, str, str]) -> dict[str, Any]:
    """Return their keys of the sizes of a mixer.

    Raises:
      ValueError: model.ssm_expand is not whole.
    """
    if config.ssm_expand != int(config.ssm_expand):
        raise ValueError(
            f"model.ssm_expand must be an integer for {config.kind} in transformers; got "
            f"{config.ssm_expand}."
        )
    state, taps, expand = keys
    return {state: config.ssm_state, taps: config.ssm_conv, expand: int(config.ssm_expand)}


def read_rank(value: Any) -> Any:
    """Return the rank of the time step; None if it follows from the width."""
    return None if value == "auto" else value


def comparable_limits(value: Any) -> Any:
    """Return limits of time steps, which JSON can spell in several ways, as floats."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return value[0], math.inf if value[1] in _INFINITE else value[1]
    return value


def read_limits(hf: Json) -> dict[str, Any]:
    """Return the keys of time_step_limit.

    Raises:
      ValueError: it is not a list of two numbers.
    """
    value = hf.get("time_step_limit")
    if value is None:
        return {}
    limits = comparable_limits(value)
    if not isinstance(limits, tuple) or not all(map(_is_number, limits)):
        raise ValueError(
            f"config.json: time_step_limit must be a list of two numbers; got {short_repr(value)}."
        )
    low, high = limits
    return {"ssm_dt_min": low, "ssm_dt_max": None if high == math.inf else high}


def write_limits(config: TimeStepLimitKeys) -> dict[str, Any]:
    """Return their key of the limits of time steps; nothing without limits."""
    limits = config.ssm_dt_limits
    return {} if limits is None else {"time_step_limit": list(limits)}


def read_shared_bias(hf: Json, of_conv: str, of_projections: str) -> dict[str, Any]:
    """Return the keys of the biases where both projections have one or none has."""
    of_both = hf.get(of_projections, False)
    return {
        "ssm_conv_bias": hf.get(of_conv, True),
        "ssm_in_bias": of_both,
        "ssm_out_bias": of_both,
    }


def write_shared_bias(config: SSMBiasKeys, of_conv: str, of_projections: str) -> dict[str, Any]:
    """Return their keys of the biases where both projections have one or none has.

    Raises:
      ValueError: only one projection has a bias.
    """
    if config.ssm_in_bias != config.ssm_out_bias:
        raise ValueError(
            f"model.ssm_out_bias must be model.ssm_in_bias ({config.ssm_in_bias}) for "
            f"{config.kind} in transformers; got {config.ssm_out_bias}."
        )
    return {of_conv: config.ssm_conv_bias, of_projections: config.ssm_in_bias}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
