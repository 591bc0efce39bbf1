"""Time of one branch on a number of tokens: fitted to measurements on a device, and kept there.

`python -m flowhn_jax.bench branches` measures; `split.balance='time'` reads.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence

import numpy as np

from flowhn_jax.split.cost import BranchDims
from kernels import device_cache

_SECTION = "branches"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BranchTimes:
    """Seconds of each branch on n tokens a sequence, as polynomials of n, lowest power first."""

    attention: tuple[float, float, float]
    ssm: tuple[float, float]

    def attention_seconds(self, tokens: np.ndarray) -> np.ndarray:
        """Of the attention branch on so many tokens of each sequence."""
        return np.polynomial.polynomial.polyval(tokens, self.attention)

    def ssm_seconds(self, tokens: np.ndarray) -> np.ndarray:
        """Of the SSM branch on so many tokens of each sequence."""
        return np.polynomial.polynomial.polyval(tokens, self.ssm)

    def balanced_tokens(self, length: int) -> int:
        """Attention's tokens a of `length` for which the branches' times are nearest equal.

        Both branches have some, where length is at least 2.
        """
        tokens = np.arange(1, max(2, length))
        excess = self.attention_seconds(tokens) - self.ssm_seconds(length - tokens)
        return int(tokens[np.argmin(np.abs(excess))])


def fit(
    tokens: Sequence[int], attention_seconds: Sequence[float], ssm_seconds: Sequence[float]
) -> BranchTimes:
    """Least squares of the relative errors: attention quadratic in its tokens, the SSM linear."""

    def polynomial(seconds: Sequence[float], degree: int) -> tuple[float, ...]:
        weights = 1 / np.asarray(seconds)
        found = np.polynomial.polynomial.polyfit(tokens, seconds, degree, w=weights)
        return tuple(map(float, found))

    return BranchTimes(polynomial(attention_seconds, 2), polynomial(ssm_seconds, 1))


def _key(dims: BranchDims) -> str:
    return json.dumps(dataclasses.asdict(dims), sort_keys=True)


def save(device_kind: str, dims: BranchDims, times: BranchTimes) -> None:
    """Keeps the times of branches of such sizes for this kind of device."""
    device_cache.write(device_kind, _SECTION, _key(dims), dataclasses.asdict(times))


def load(device_kind: str, dims: BranchDims) -> BranchTimes | None:
    """The times that `save` kept; None where there are none, or something else in their place."""
    found = device_cache.read(device_kind, _SECTION, _key(dims))
    if found is None:
        return None
    try:
        attention, ssm = (tuple(map(float, found[name])) for name in ("attention", "ssm"))
    except (KeyError, TypeError, ValueError):
        attention = ssm = ()
    if (len(attention), len(ssm)) != (3, 2) or not np.isfinite([*attention, *ssm]).all():
        _log.warning("times kept for the branches on %s are damaged: %s", device_kind, found)
        return None
    return BranchTimes(attention, ssm)
