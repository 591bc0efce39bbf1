"""The model families of Hugging Face's transformers: their configs and names, and ours.

A setting that only one side supports is refused by name.
"""

from typing import Any

from flowhn_jax import config as config_lib
from flowhn_jax.config import ModelConfig
from flowhn_jax.interop.families import falcon_h1, jamba, llama, mamba
from flowhn_jax.interop.families.family import Family, Json
from flowhn_jax.interop.families.state_space import comparable_limits
from flowhn_jax.interop.json_types import check_types
from flowhn_jax.utils.text import short_repr

_DEFAULT_CONTEXT = 1024  # if config.json has none, as for Mamba, which has no limit

FAMILIES = {
    "llama": llama.LLAMA,
    "mamba": mamba.MAMBA,
    "mamba2": mamba.MAMBA2,
    "jamba": jamba.FAMILY,
    "falcon_h1": falcon_h1.FAMILY,
    "falcon_mamba": mamba.FALCON_MAMBA,
    "mistral": llama.MISTRAL,
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
}


def to_config(hf_config: Json) -> tuple[Family, ModelConfig]:
    """Return the family and our config for a config.json.

    Raises:
      ValueError: its `model_type` or another value is not supported, or a key is missing.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type must be one of {', '.join(FAMILIES)}; got "
            f"{short_repr(model_type)}."
        )
    check_types(hf_config)
    family = FAMILIES[model_type]
    refused = [
        f"{key} must be {' or '.join(map(repr, supported))}, got {short_repr(hf_config[key])}"
        for key, supported in {**_SUPPORTED, **family.supported}.items()
        if supported is not None
        and key in hf_config
        and comparable_limits(hf_config[key]) not in supported
    ]
    if refused:
        raise ValueError(f"config.json of {model_type}: {'; '.join(refused)}.")
    try:
        keys = family.read(hf_config) | {
            "kind": family.kind,
            "vocab_size": hf_config["vocab_size"],
            "width": hf_config["hidden_size"],
            "blocks": hf_config["num_hidden_layers"],
            "context": hf_config.get("max_position_embeddings", _DEFAULT_CONTEXT),
            "init_std": hf_config.get("initializer_range", 0.02),
            "norm_eps": hf_config[_epsilon(family.kind)],
            "tie_embeddings": hf_config.get("tie_word_embeddings", family.is_tied),
        }
    except KeyError as error:
        raise ValueError(f"config.json of {model_type} must have {error}.") from error
    return family, config_lib.parse({"model": keys}).model


def to_json(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """Return the family and the config.json for our config.

    Raises:
      ValueError: transformers has no such model.
    """
    of_kind = [item for item in FAMILIES.items() if item[1].kind == config.kind]
    if not of_kind:
        raise ValueError(f"transformers has no model of model.kind = {config.kind!r}.")
    found = [item for item in of_kind if item[1].can_write(config)]
    if not found:
        raise ValueError(
            f"The options of model.kind {config.kind!r} must be those of one of "
            f"{', '.join(model_type for model_type, _ in of_kind)} in transformers; got "
            f"{short_repr(config)}."
        )
    ((model_type, family),) = found
    return family, {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.blocks,
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        _epsilon(config.kind): config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        **family.write(config),
    }


def _epsilon(kind: str) -> str:
    return "layer_norm_epsilon" if kind in ("mamba1", "mamba2") else "rms_norm_eps"


_SUPPORTED = {  # in all families
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "is_causal": (True,),
    "per_layer_config": (None,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
