"""Configuration: an ml_collections ConfigDict in, frozen and validated dataclasses out.

The dataclasses are the one place that names the keys, their types, defaults and meanings. Those of
`model` are in the file of each model family, of `model.split` in `split`, of `data` in
`data.config`, of `mesh` in `parallel.mesh`, of `train` in `train_config`, and the others here.

`default()` gives all keys as a ConfigDict for the recipes under `configs/`, `parse()` takes such a
ConfigDict (or a plain nested dict, as in a workdir's config.json) back.
"""

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from flowhn_jax.data.config import DataConfig
from flowhn_jax.models import registry
from flowhn_jax.models.base import ModelConfig
from flowhn_jax.models.falcon_h1 import Multipliers
from flowhn_jax.models.flowhn_config import FlowHNConfig, require_flowhn
from flowhn_jax.parallel.mesh import MeshConfig
from flowhn_jax.train_config import OPTIMIZERS, REMATS, SCHEDULES, TrainConfig
from flowhn_jax.utils import typed
from flowhn_jax.utils.checks import require
from flowhn_jax.utils.limits import MAX_INT
from flowhn_jax.utils.text import short_repr
from kernels.operations import check_backends

__all__ = [
    "BASELINES",
    "KINDS",
    "OPTIMIZERS",
    "REMATS",
    "SCHEDULES",
    "Config",
    "DataConfig",
    "FlowHNConfig",
    "KernelsConfig",
    "MeshConfig",
    "ModelConfig",
    "Multipliers",
    "TrainConfig",
    "default",
    "describe_keys",
    "differences",
    "flat",
    "parse",
    "require_flowhn",
    "to_dict",
]

KINDS = registry.kinds()  # of the models that come with the package
BASELINES = tuple(kind for kind in KINDS if kind != FlowHNConfig.kind)


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """Which backends run the operations under `kernels/`.

    Attributes:
      backend: 'auto', 'xla', or OPERATION=BACKEND with commas between them; the environment
        variable FLOWHN_KERNELS_BACKEND takes precedence.
    """

    backend: str = "auto"

    def __post_init__(self):
        check_backends(self.backend, "kernels.backend")


@dataclasses.dataclass(frozen=True)
class Config:
    """All that defines a run.

    Attributes:
      model: the config of the family that model.kind names.
      data: what to train on.
      train: how to train.
      mesh: over which devices.
      kernels: with which kernels.
    """

    model: ModelConfig = dataclasses.field(default_factory=FlowHNConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)

    def __post_init__(self):
        without_branches = f"1 for model.kind {self.model.kind!r}, which has no branches"
        ok = self.mesh.branch == 1 or self.model.has_branches
        require(ok, "mesh.branch", without_branches, self.mesh.branch)
        names = ("''", *self.data.names)
        require(
            self.train.best_by in ("", *self.data.names),
            "train.best_by",
            f"the name of a set in data.path or data.validation, here one of {', '.join(names)}",
            self.train.best_by,
        )


def _keys() -> type:
    """Return a dataclass of all keys: Config, with the union of all families' keys as model."""
    return _keys_of(registry.kinds())


@functools.cache
def _keys_of(kinds: tuple[str, ...]) -> type:
    assert kinds == registry.kinds()
    copies: list[Any] = [("kind", str, dataclasses.field(default=FlowHNConfig.kind))]
    for name, field in registry.all_keys().items():
        if field.default_factory is not dataclasses.MISSING:
            copy = dataclasses.field(default_factory=field.default_factory)
        else:
            copy = dataclasses.field(default=field.default)
        copies.append((name, field.type, copy))
    model = dataclasses.make_dataclass("ModelKeys", copies, frozen=True)
    groups = [
        (field.name, field.type, dataclasses.field(default_factory=field.default_factory))
        for field in dataclasses.fields(Config)
        if field.name != "model" and field.default_factory is not dataclasses.MISSING
    ]
    model_group = ("model", model, dataclasses.field(default_factory=model))
    return dataclasses.make_dataclass("ConfigKeys", [model_group, *groups], frozen=True)


def parse(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Return the validated config of a ConfigDict or nested dict; absent keys take their defaults.

    Raises:
      ValueError: an unknown key, a value of the wrong type or outside its range, or a key that the
        model family does not read and that is not at its default; the message names the key, what
        it must be and what was found.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    found = typed.build(_keys(), config, what="config key", most=MAX_INT)
    model = _family_config(found.model)
    return Config(model, found.data, found.train, found.mesh, found.kernels)


def _family_config(found: Any) -> ModelConfig:
    """Return the config of the family that `found.kind` names, of the union of all keys."""
    family = registry.config_class(found.kind)
    read = {field.name for field in dataclasses.fields(family)}
    defaults = type(found)()
    for name in registry.all_keys():
        value, unread = getattr(found, name), getattr(defaults, name)
        if name not in read and value != unread:
            raise ValueError(
                f"model.{name} must be its default, {short_repr(unread)}, for model.kind "
                f"{found.kind!r}, which does not read it; got {short_repr(value)}."
            )
    return family(**{name: getattr(found, name) for name in read})


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as nested plain dicts, ready for JSON.

    A model's keys are those of all families, the ones that it does not read at their defaults.
    """
    if isinstance(config, ModelConfig):
        read = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return dataclasses.asdict(type(_keys()().model)(kind=config.kind, **read))
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(config)
        for value in (getattr(config, field.name),)
    }


def default() -> ml_collections.ConfigDict:
    """Return all keys with their defaults, for recipes to start from and for flags to override."""

    def as_config_dict(config: Any) -> ml_collections.ConfigDict:
        hints = typing.get_type_hints(type(config))
        out = ml_collections.ConfigDict()
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                out[field.name] = as_config_dict(value)
            elif value is None:
                kinds = typing.get_args(hints[field.name])
                kind = next(kind for kind in kinds if kind is not type(None))
                out[field.name] = config_dict.placeholder(kind)
            else:
                out[field.name] = value
        return out

    return as_config_dict(_keys()())


def describe_keys() -> dict[str, tuple[str, Any, str]]:
    """Return type, default and meaning of every config key, by its dotted name.

    The meaning is the entry of the key in the `Attributes:` section of its dataclass; that of a
    model's key ends with the families that read it, unless all do.
    """
    found = {}
    for key, kind, value, description in _described(_keys()(), ""):
        group, name = key.split(".")[:2]
        families = registry.reading(name) if group == "model" else ()
        if families and families != registry.kinds():
            description += f" Only for model.kind {', '.join(families)}."
        found[key] = kind, value, description
    return found


def _described(config: Any, prefix: str) -> Iterator[tuple[str, str, Any, str]]:
    """Yield name, type, default and meaning of each key in a group and in the groups inside it."""
    sources = (type(config),)
    if prefix == "model.":
        sources = tuple(map(registry.config_class, registry.kinds()))
    meanings = {}
    for source in sources:
        meanings = _attribute_docs(source) | meanings
    if prefix == "model.":
        meanings["kind"] = f"model family, one of {', '.join(registry.kinds())}."
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _described(value, f"{key}.")
        else:
            kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            yield key, kind, value, meanings.get(field.name, "")


def _attribute_docs(cls: type) -> dict[str, str]:
    """Return the entries of the `Attributes:` sections of a class and its bases, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition(
            "\nAttributes:\n"
        )
        entry = re.compile(r"^  (\w+): (.*(?:\n    .*)*)", re.MULTILINE)
        for name, text in entry.findall(section):
            found[name] = " ".join(text.split())
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested dict by their dotted keys."""
    found = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the keys whose values differ between two nested dicts, as 'key: old -> new'."""
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {short_repr(before)} -> {short_repr(after)}")
    return found
