"""The keys of state-space mixers in config.json."""

import math
from typing import Any

from flowhn_jax.interop.families.family import Json
from flowhn_jax.models.base import StateSpaceKeys

UNLIMITED = (0.0, math.inf)  # time_step_limit

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
