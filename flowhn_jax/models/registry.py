"""Model families by name: `model.kind` selects a config class and the module that it describes."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from flowhn_jax.models.base import ModelConfig
from flowhn_jax.models.language_model import LanguageModel
from flowhn_jax.utils.checks import require

ModelT = TypeVar("ModelT", bound=type[LanguageModel])

_FAMILIES: dict[str, tuple[type[ModelConfig], type[LanguageModel]]] = {}


def register(config: type[ModelConfig]) -> Callable[[ModelT], ModelT]:
    """Return a decorator that registers a module class under `config.kind`.

    Args:
      config: the family's config. A key that another family has as well must have its default.

    Raises:
      ValueError: the kind is taken, or a shared key has another default.
    """

    def add(model: ModelT) -> ModelT:
        if config.kind in _FAMILIES:
            raise ValueError(f"model.kind {config.kind!r} is already registered.")
        shared = all_keys()
        for field in dataclasses.fields(config):
            other = shared.get(field.name, field)
            if _default(other) != _default(field):
                raise ValueError(
                    f"model.{field.name} must have the default {_default(other)!r} in every "
                    f"family; {config.__name__} has {_default(field)!r}."
                )
        _FAMILIES[config.kind] = config, model
        return model

    return add


def kinds() -> tuple[str, ...]:
    """Return the names of all families, in the order in which they were registered."""
    return tuple(_FAMILIES)


def config_class(kind: str) -> type[ModelConfig]:
    """Return the config class of a family.

    Raises:
      ValueError: there is no such family.
    """
    require(kind in _FAMILIES, "model.kind", f"one of {', '.join(_FAMILIES)}", kind)
    return _FAMILIES[kind][0]


def model_class(kind: str) -> type[LanguageModel]:
    """Return the module class of a family.

    Raises:
      ValueError: there is no such family.
    """
    require(kind in _FAMILIES, "model.kind", f"one of {', '.join(_FAMILIES)}", kind)
    return _FAMILIES[kind][1]


def all_keys() -> "dict[str, dataclasses.Field[Any]]":
    """Return the keys of all families by name, each with its type and its default."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for config, _ in _FAMILIES.values():
        found |= {f.name: f for f in dataclasses.fields(config) if f.name not in found}
    return found


def reading(key: str) -> tuple[str, ...]:
    """Return the names of the families that read a key of `model`."""
    return tuple(
        kind
        for kind, (config, _) in _FAMILIES.items()
        if any(field.name == key for field in dataclasses.fields(config))
    )


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
