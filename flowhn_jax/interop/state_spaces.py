"""The repositories of Mamba's authors (state-spaces/mamba-130m and others) as transformers' models.

Their config.json has the arguments of `mamba_ssm` and no model_type. Their parameters, in
pytorch_model.bin, have transformers' names but for the embedding's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowhn_jax.utils.checks import require
from flowhn_jax.utils.text import short_repr

_EPSILON, _INIT_STD = 1e-5, 0.02  # of mamba_ssm, whose config.json has no keys for them
_EMBEDDING = "backbone.embedding.weight", "backbone.embeddings.weight"  # theirs, transformers'

# Arguments of a layer, each with its default and transformers' key.
_SHARED = {
    "d_conv": (4, "conv_kernel"),
    "expand": (2, "expand"),
    "bias": (False, "use_bias"),
    "conv_bias": (True, "use_conv_bias"),
}
_LAYERS = {
    "Mamba1": (
        "mamba",
        {**_SHARED, "d_state": (16, "state_size"), "dt_rank": ("auto", "time_step_rank")},
    ),
    "Mamba2": (
        "mamba2",
        {
            **_SHARED,
            "d_state": (128, "state_size"),
            "headdim": (64, "head_dim"),
            "ngroups": (1, "n_groups"),
            "dt_limit": ([0.0, float("inf")], "time_step_limit"),
        },
    ),
}
# Arguments that parameters do not depend on: they initialize, or choose among equal computations.
_WITHOUT_EFFECT = {
    *("layer", "chunk_size", "use_fast_path", "use_mem_eff_path", "conv_init", "A_init_range"),
    *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"),
}
# Arguments that have one supported value, their default.
_FIXED = {"d_ssm": None, "rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False}


def is_original(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is one of Mamba's authors."""
    return "model_type" not in config and "d_model" in config


def to_hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' config.json for one of Mamba's authors.

    Raises:
      ValueError: an argument is unknown or not supported.
    """
    _check(config, "attn_layer_idx", [], "as hybrids with attention layers are not supported")
    _check(config, "d_intermediate", 0, "as MLPs are not supported")
    _check(config, "rms_norm", True, "as layer norms are not supported")
    arguments = config.get("ssm_cfg") or {}
    require(isinstance(arguments, Mapping), "config.json: ssm_cfg", "an object", arguments)
    layer = arguments.get("layer", "Mamba1")
    names = " or ".join(_LAYERS)
    is_known = isinstance(layer, str) and layer in _LAYERS
    require(is_known, "config.json: the layer of ssm_cfg", names, layer)
    model_type, keys = _LAYERS[layer]
    for name, value in arguments.items():
        if name in _FIXED and layer == "Mamba2":
            _check(arguments, name, _FIXED[name], "in ssm_cfg, as others are not supported")
        elif name not in keys and name not in _WITHOUT_EFFECT:
            raise ValueError(
                f"config.json: ssm_cfg must have arguments of {layer} that are supported; got "
                f"{short_repr(name)}: {short_repr(value)}."
            )
    is_tied = config.get("tie_embeddings", True)
    is_flag = isinstance(is_tied, bool)
    require(is_flag, "config.json: tie_embeddings", "true or false", is_tied)
    width, blocks, vocab_size = (_size(config, key) for key in ("d_model", "n_layer", "vocab_size"))
    multiple = _size({"pad_vocab_size_multiple": 8, **config}, "pad_vocab_size_multiple")
    found = {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "vocab_size": -(-vocab_size // multiple) * multiple,
        "layer_norm_epsilon": _EPSILON,
        "initializer_range": _INIT_STD,
        "tie_word_embeddings": is_tied,
        **{theirs: arguments.get(name, default) for name, (default, theirs) in keys.items()},
    }
    if layer == "Mamba2":
        sizes = {"expand": found["expand"], "headdim": found["head_dim"]}
        found["num_heads"] = _size(sizes, "expand") * width // _size(sizes, "headdim")
    return found


def to_hf_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the parameters by transformers' names."""
    old, new = _EMBEDDING
    return {new if name == old else name: array for name, array in arrays.items()}


def _check(config: Mapping[str, Any], key: str, supported: Any, reason: str) -> None:
    value = config.get(key, supported)
    if value != supported:
        raise ValueError(
            f"config.json: {key} must be {supported!r}, {reason}; got {short_repr(value)}."
        )


def _size(config: Mapping[str, Any], key: str) -> int:
    """Return the value of a key.

    Raises:
      ValueError: it is missing, or not an integer above 0.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config.json: {key} must be an integer above 0; got {short_repr(value)}.")
    return value
