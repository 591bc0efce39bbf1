"""Groups of keys that only models published by others need: biases, and limits of time steps.

The defaults are the papers': a bias in the mixers' convolution and nowhere else, and no limits.
"""

import dataclasses
import math

from flowhn_jax.layers.ssm_biases import SSMBiases
from flowhn_jax.models.base import AttentionKeys, Mamba2Keys, StateSpaceKeys
from flowhn_jax.utils.checks import require

ATTENTION_BIASES = ("none", "qkv", "all")


@dataclasses.dataclass(frozen=True)
class AttentionBiasKeys(AttentionKeys):
    """Keys of families whose attention and MLPs can have biases.

    Attributes:
      attention_bias: which products of attention have a bias: 'none', 'qkv' (queries, keys and
        values, as in Qwen2), or 'all' (the output as well).
      mlp_bias: whether the products of the MLPs have a bias.
    """

    attention_bias: str = "none"
    mlp_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        allowed = f"one of {', '.join(ATTENTION_BIASES)}"
        bias = self.attention_bias
        require(bias in ATTENTION_BIASES, "model.attention_bias", allowed, bias)


@dataclasses.dataclass(frozen=True)
class SSMBiasKeys(StateSpaceKeys):
    """Keys of families whose state-space mixers can have other biases than the papers'.

    Attributes:
      ssm_conv_bias: whether the mixer's convolution has a bias.
      ssm_in_bias: whether the mixer's input projection has a bias.
      ssm_out_bias: whether the mixer's output projection has a bias.
    """

    ssm_conv_bias: bool = True
    ssm_in_bias: bool = False
    ssm_out_bias: bool = False

    @property
    def ssm_biases(self) -> SSMBiases:
        """Which parts of a mixer have a bias."""
        return SSMBiases(self.ssm_conv_bias, self.ssm_in_bias, self.ssm_out_bias)


@dataclasses.dataclass(frozen=True)
class TimeStepLimitKeys(Mamba2Keys):
    """Keys of families whose Mamba-2 mixers can limit their time steps.

    Attributes:
      ssm_dt_min: smallest time step of Mamba-2, after the softplus.
      ssm_dt_max: largest time step of Mamba-2, after the softplus; None: no limit.
    """

    ssm_dt_min: float = 0.0
    ssm_dt_max: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.ssm_dt_min >= 0, "model.ssm_dt_min", "0 or more", self.ssm_dt_min)
        above = self.ssm_dt_max is None or self.ssm_dt_max > self.ssm_dt_min
        least = f"above model.ssm_dt_min ({self.ssm_dt_min:g}), or None"
        require(above, "model.ssm_dt_max", least, self.ssm_dt_max)

    @property
    def ssm_dt_limits(self) -> tuple[float, float] | None:
        """The smallest and the largest time step; None without a limit."""
        if self.ssm_dt_min == 0 and self.ssm_dt_max is None:
            return None
        return self.ssm_dt_min, math.inf if self.ssm_dt_max is None else self.ssm_dt_max
