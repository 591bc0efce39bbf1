"""The types of what Hugging Face's config.json is read for before it becomes a config of ours.

The rest is checked as our own keys are.
"""

import math
from collections.abc import Mapping
from typing import Any

from flowhn_jax.utils.text import short_repr

_OPTIONAL_SIZES = {"head_dim", "num_key_value_heads", "mamba_d_ssm"}
_SIZES = {
    "hidden_size",
    "num_attention_heads",
    "expand",
    "num_heads",
    "mamba_expand",
    "mamba_n_heads",
}
_KINDS = {
    "ssm_multipliers": (list | None, "a list"),
    "mlp_multipliers": (list | None, "a list"),
    "rope_scaling": (Mapping | None, "an object"),
    "rope_parameters": (Mapping | None, "an object"),
    "tie_word_embeddings": (bool, "true or false"),
}


def check_types(hf_config: Mapping[str, Any]) -> None:
    """Checks the values that are calculated with or looked into.

    Raises:
      ValueError: one is of another type, or a size that is not above 0.
    """
    for key, value in hf_config.items():
        kind, accepted = _KINDS.get(key, (object, ""))
        is_good = isinstance(value, kind)
        if key in _SIZES or (key in _OPTIONAL_SIZES and value is not None):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            is_good, accepted = is_number and 0 < value < math.inf, "a size above 0"
        if not is_good:
            raise ValueError(
                f"config.json has {key} = {short_repr(value)}; accepted is {accepted}."
            )
