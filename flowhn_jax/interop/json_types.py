"""Types of the values in Hugging Face's config.json that are read before they become ours.

All other values are checked as keys of our own config.
"""

import math
from collections.abc import Mapping
from typing import Any

from flowhn_jax.utils.text import short_repr

_OPTIONAL_SIZES = {"head_dim", "intermediate_size", "num_key_value_heads", "mamba_d_ssm"}
_SIZES = {
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
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
    "use_sliding_window": (bool, "true or false"),
    "max_window_layers": (int, "a number of layers"),
    "layer_types": (list | None, "a list"),
}


def check_types(hf_config: Mapping[str, Any]) -> None:
    """Check the values that are computed with or looked into.

    Raises:
      ValueError: a value has another type, or a size is not above 0.
    """
    for key, value in hf_config.items():
        kind, expected = _KINDS.get(key, (object, ""))
        is_valid = isinstance(value, kind)
        if key in _SIZES or (key in _OPTIONAL_SIZES and value is not None):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            is_valid, expected = is_number and 0 < value < math.inf, "a size above 0"
        if not is_valid:
            raise ValueError(f"config.json: {key} must be {expected}; got {short_repr(value)}.")
