"""Time of one branch on a number of tokens: fitted to measurements and cached per kind of device.

`python -m flowhn_jax.bench branches` measures and saves; `model.split.balance='time'` loads.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence

import numpy as np

from flowhn_jax.split.cost import BranchDims
from kernels import device_cache

_SECTION = "branches"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BranchTimes:
    """Seconds of each branch as polynomials of the tokens per sequence, lowest power first."""

    attention: tuple[float, float, float]
    ssm: tuple[float, float]

    def attention_seconds(self, tokens: np.ndarray) -> np.ndarray:
        """Return the attention branch's seconds on `tokens` tokens of each sequence."""
        return np.polynomial.polynomial.polyval(tokens, self.attention)

    def ssm_seconds(self, tokens: np.ndarray) -> np.ndarray:
        """Return the SSM branch's seconds on `tokens` tokens of each sequence."""
        return np.polynomial.polynomial.polyval(tokens, self.ssm)

    def balanced_tokens(self, length: int) -> int:
        """Return attention's tokens of `length` for which the branches' times are nearest equal.

        Each branch gets at least one if `length` is at least 2.
        """
        tokens = np.arange(1, max(2, length))
        excess = self.attention_seconds(tokens) - self.ssm_seconds(length - tokens)
        return int(tokens[np.argmin(np.abs(excess))])


def fit(
    tokens: Sequence[int], attention_seconds: Sequence[float], ssm_seconds: Sequence[float]
) -> BranchTimes:
    """Return the times with the least squares of relative errors.

    Attention is quadratic in its tokens, the SSM linear.

    Args:
      tokens: numbers of tokens per sequence that were measured.
      attention_seconds: seconds of the attention branch for each.
      ssm_seconds: seconds of the SSM branch for each.
    """

    def polynomial(seconds: Sequence[float], degree: int) -> list[float]:
        weights = 1 / np.asarray(seconds)
        found = np.polynomial.polynomial.polyfit(tokens, seconds, degree, w=weights)
        return [float(coefficient) for coefficient in found]

    constant, linear, quadratic = polynomial(attention_seconds, 2)
    ssm_constant, ssm_linear = polynomial(ssm_seconds, 1)
    return BranchTimes((constant, linear, quadratic), (ssm_constant, ssm_linear))


def _key(dims: BranchDims) -> str:
    """Return the sizes as text, without those that are not set: older files do not have them."""
    sizes = {name: size for name, size in dataclasses.asdict(dims).items() if size is not None}
    return json.dumps(sizes, sort_keys=True)


def save(device_kind: str, dims: BranchDims, times: BranchTimes) -> None:
    """Save the times of branches of these sizes on this kind of device."""
    device_cache.write(device_kind, _SECTION, _key(dims), dataclasses.asdict(times))


def load(device_kind: str, dims: BranchDims) -> BranchTimes | None:
    """Return the saved times of branches of these sizes; None if missing or damaged."""
    found = device_cache.read(device_kind, _SECTION, _key(dims))
    if found is None:
        return None
    try:
        (a0, a1, a2), (s0, s1) = (map(float, found[name]) for name in ("attention", "ssm"))
    except (KeyError, TypeError, ValueError):
        a0 = a1 = a2 = s0 = s1 = math.nan
    if not np.isfinite([a0, a1, a2, s0, s1]).all():
        _log.warning("the saved times of the branches on %s are damaged: %s", device_kind, found)
        return None
    return BranchTimes((a0, a1, a2), (s0, s1))
