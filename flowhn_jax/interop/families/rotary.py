"""The keys of rotary positions in config.json."""

from collections.abc import Mapping
from typing import Any

from flowhn_jax.interop.families.family import Json
from flowhn_jax.layers.rope import yarn_factor
from flowhn_jax.models.base import ScaledRotaryKeys
from flowhn_jax.utils.text import short_repr

_DEFAULT_ROPE_THETA = 10000.0  # if config.json has none, as for the first Llamas
_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rope(hf: Json) -> dict[str, Any]:
    """Return the keys of rotary positions.

    They are in `rope_parameters`, or in `rope_scaling`, its name before transformers 5.

    Raises:
      ValueError: the scaling is not supported, or its keys do not fit each other.
    """
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    given = hf.get(name) or {}
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            "config.json must have one rope_theta for all layers; it has separate ones for "
            f"{short_repr(nested[0])}."
        )
    rope = {**hf, **given}
    found = given.get("rope_type", given.get("type", "default"))
    if found not in _TYPES:
        raise ValueError(
            f"config.json: rope_type must be {', '.join(_TYPES[:-1])} or {_TYPES[-1]}; got "
            f"{short_repr(found)}."
        )
    share = rope.get("partial_rotary_factor")
    if share not in (None, 1):
        raise ValueError(f"config.json: partial_rotary_factor must be 1; got {short_repr(share)}.")
    keys = {"rope_theta": rope.get("rope_theta", _DEFAULT_ROPE_THETA)}
    if found != "default":
        keys["rope_scaling"] = _read_scaling(hf, given, found, name)
    return keys


def _read_scaling(hf: Json, given: Json, found: str, name: str) -> dict[str, Any]:
    context = hf.get("max_position_embeddings")
    # transformers prefers the key next to the scaling to the one inside it.
    inside = given.get("original_max_position_embeddings", context)
    original = hf.get("original_max_position_embeddings", inside)
    keys = {"type": found, "factor": given.get("factor")}
    if found == "dynamic":
        keys["original_context"] = context
    elif found == "llama3":
        keys["original_context"] = original
        keys |= {each: given.get(each) for each in ("low_freq_factor", "high_freq_factor")}
    elif found == "yarn":
        keys["original_context"] = original
        keys |= _read_yarn(given, keys, context)
    missing = [key for key, value in keys.items() if value is None]
    if missing:
        prefix = "" if found == "dynamic" else "original_"
        raise ValueError(
            f"config.json: {name} of type {found!r} must have "
            f"{missing[0].replace('original_context', f'{prefix}max_position_embeddings')}."
        )
    return keys


def _read_yarn(given: Json, keys: Json, context: Any) -> dict[str, Any]:
    """Return yarn's own keys, and its factor where only the contexts imply it."""
    names = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    numbers = {name: given.get(name) for name in names}
    numbers["original_max_position_embeddings"] = keys["original_context"]
    for key, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"config.json: {key} must be a number; got {short_repr(value)}.")
    factor, original = keys["factor"], keys["original_context"]
    if factor is None and context and original:
        factor = context / original
    found = {"factor": factor, "truncate": given.get("truncate", True)}
    for key in ("beta_fast", "beta_slow"):
        if given.get(key):
            found[key] = given[key]
    one, other = given.get("mscale"), given.get("mscale_all_dim")
    if given.get("attention_factor") is not None:
        found["attention_factor"] = given["attention_factor"]
    elif factor is not None and one and other:
        found["attention_factor"] = yarn_factor(factor, one) / yarn_factor(factor, other)
    return found


def write_rope(config: ScaledRotaryKeys) -> dict[str, Any]:
    """Return their keys of rotary positions."""
    scaling = config.rope_scaling
    found: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if scaling.type == "none":
        return {"rope_parameters": found}
    found |= {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "dynamic":  # which has no key for the original context
        return {
            "rope_parameters": found,
            "max_position_embeddings": scaling.original_context,
        }
    if scaling.type != "linear":
        found["original_max_position_embeddings"] = scaling.original_context
    own = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "truncate"),
    }
    found |= {key: getattr(scaling, key) for key in own.get(scaling.type, ())}
    if scaling.type == "yarn":
        found["attention_factor"] = scaling.rotation_factor
    return {"rope_parameters": found}
