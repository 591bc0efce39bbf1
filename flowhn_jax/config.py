"""Configuration: an ml_collections ConfigDict in, frozen and validated dataclasses out.

The dataclasses are the one place that names the keys, their types, defaults and meanings. Those of
`model` are in the file of each model family, of `model.split` in `split`, of `data` in
`data.config`, of `mesh` in `parallel.mesh`, and the others here.

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
from flowhn_jax.models.flowhn import FlowHNConfig, require_flowhn
from flowhn_jax.parallel.mesh import MeshConfig
from flowhn_jax.storage import check_scheme
from flowhn_jax.utils import typed
from flowhn_jax.utils.checks import nearest_multiples, require, require_positive
from flowhn_jax.utils.limits import MAX_INT
from flowhn_jax.utils.text import short_repr
from kernels.operations import check_backends

__all__ = [
    "BASELINES",
    "KINDS",
    "REMATS",
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
REMATS = ("none", "dots", "full")
MOMENT_DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
WRITERS = ("jsonl", "tensorboard", "wandb", "trackio")
_CHECKPOINT = re.compile(r"(^|/)checkpoints/\d+/?$")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; optimizer and rates default to the paper's at 135M.

    Attributes:
      steps: updates of the run.
      batch_size: sequences per step, over all devices.
      accumulate: micro-batches per step; the update is that of one large batch.
      learning_rate: peak of the schedule, reached after the warm-up.
      schedule: what follows the warm-up: 'cosine' and 'linear' fall to the final rate at the last
        step; 'wsd' (warm-up, stable, decay; arXiv 2404.06395) stays at the peak and falls linearly
        in the cooldown; 'constant' stays at the peak.
      final_learning_rate: learning rate at the end, as a share of the peak; 'constant' has none.
      warmup: share of the steps in which the learning rate rises linearly.
      cooldown: share of the steps, the last ones, in which the rate of schedule 'wsd' falls.
      optimizer: 'adamw', or 'muon' (arXiv 2502.16982), which trains the matrices between embedding
        and head by orthogonalized means of gradients (decay rate 0.95, Nesterov), and all other
        parameters by AdamW. Each step subtracts learning_rate * (update + weight_decay * matrix),
        as AdamW's does, and Muon's updates are scaled by 0.2 * sqrt(max(inputs, outputs)) to the
        size of AdamW's, so that a learning rate of AdamW is one to start from.
      beta1: AdamW's decay rate of the mean of gradients.
      beta2: AdamW's decay rate of the mean of squared gradients.
      epsilon: AdamW's epsilon.
      moment_dtype: type in which the optimizer's mean of gradients is stored: 'float32', or
        'bfloat16' for 2 bytes per parameter less memory and 4 less traffic per step. Arithmetic is
        float32.
      weight_decay: decoupled weight decay, on matrices only.
      ema: decay per step of the weights in an average of the parameters, e.g. 0.999, which is
        validated and saved next to them; 0 for none. It takes 4 bytes per parameter.
      clip_norm: largest global gradient norm; 0 for no clipping.
      z_loss: weight of the squared log-normalizer (arXiv 2204.02311, section 5).
      remat: what the backward pass keeps: 'none' keeps all activations, 'dots' the results of
        matrix products and of fused kernels, 'full' only the blocks' inputs.
      seed: seed of the initial parameters.
      init_from: run (workdir) or folder with safetensors and a Hugging Face config, local, gs:// or
        hf://, whose parameters a new run starts from; '' for random ones.
      branch_from: a checkpoint WORKDIR/checkpoints/STEP at which a workdir without checkpoints
        begins: parameters, optimizer, position in the data and rows are those of that run. A
        resume does not read it again; '' for none.
      profile: START:COUNT, the steps of which a profile is written for TensorBoard, e.g. 100:5 for
        the steps 100 to 104; '' for none.
      log_every: steps between logged rows.
      writers: where the rows go, names separated by commas: 'jsonl' (metrics.jsonl, required, since
        a resumed run continues its rows), 'tensorboard', 'wandb' and 'trackio'.
      eval_every: steps between validations.
      eval_windows: validation windows; 0 for the whole validation set.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: newest checkpoints to keep; the best by validation loss is kept as well.
      best_by: set whose validation loss decides which checkpoint is the best: a name in data.path,
        if that is a mixture, or in data.validation; '' for validation_loss.
      keep_every: checkpoints at multiples of this many steps are never deleted; 0 for none.
      max_skipped: consecutive steps without finite gradients after which the run stops or rewinds.
      rewinds: how often the run may return to the last good checkpoint and skip the data after it.
      debug_nans: stop at the operation that makes the first NaN; slow.
      hang_minutes: minutes without a finished step after which all stacks are printed.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    final_learning_rate: float = 0.1
    warmup: float = 0.1
    cooldown: float = 0.2
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    moment_dtype: str = "float32"
    weight_decay: float = 0.1
    ema: float = 0.0
    clip_norm: float = 1.0
    z_loss: float = 0.0
    remat: str = "none"
    seed: int = 0
    init_from: str = ""
    branch_from: str = ""
    profile: str = ""
    log_every: int = 10
    writers: str = "jsonl,tensorboard"
    eval_every: int = 100
    eval_windows: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    best_by: str = ""
    keep_every: int = 0
    max_skipped: int = 10
    rewinds: int = 0
    debug_nans: bool = False
    hang_minutes: float = 30.0

    def __post_init__(self):
        positive = ("steps", "batch_size", "accumulate", "learning_rate", "epsilon")
        cadence = ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        cadence += ("max_skipped", "hang_minutes")
        require_positive(self, "train", *positive, *cadence)
        for name in ("final_learning_rate", "warmup", "cooldown"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.{name}", "0 to 1", value)
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", "0 or more and below 1", value)
        least_zero = ("weight_decay", "clip_norm", "z_loss", "eval_windows", "seed")
        for name in (*least_zero, "keep_every", "rewinds"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", "0 or more", value)
        require(
            self.batch_size % self.accumulate == 0,
            "train.batch_size",
            f"a multiple of train.accumulate ({self.accumulate}), "
            + nearest_multiples(self.batch_size, self.accumulate),
            self.batch_size,
        )
        for name, others in (("init_from", ("hf",)), ("branch_from", ())):
            try:
                check_scheme(getattr(self, name), others)
            except ValueError as error:
                raise ValueError(f"train.{name}: {error}") from error
        branch = "train.branch_from"
        is_step = not self.branch_from or _CHECKPOINT.search(self.branch_from) is not None
        require(is_step, branch, "a checkpoint WORKDIR/checkpoints/STEP", self.branch_from)
        is_one = not (self.branch_from and self.init_from)
        require(is_one, branch, "'' with train.init_from", self.branch_from)
        steps = self.profiled_steps
        require(
            not self.profile or (len(steps) > 0 and 1 <= steps[0] <= steps[-1] <= self.steps),
            "train.profile",
            f"START:COUNT, e.g. 5:3 for the steps 5 to 7, from 1 to train.steps ({self.steps})",
            self.profile,
        )
        choices = {
            "remat": REMATS,
            "moment_dtype": MOMENT_DTYPES,
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"train.{name}", f"one of {', '.join(allowed)}", value)
        require(
            self.schedule != "wsd" or self.warmup + self.cooldown <= 1,
            "train.cooldown",
            f"at most 1 - train.warmup ({1 - self.warmup:g}) for train.schedule 'wsd'",
            self.cooldown,
        )
        names = self.writers.split(",")
        require(
            "jsonl" in names and set(names) <= set(WRITERS) and len(names) == len(set(names)),
            "train.writers",
            "jsonl, whose rows a resumed run continues, and any of "
            f"{', '.join(WRITERS[1:])}, each once and separated by commas",
            self.writers,
        )

    @property
    def profiled_steps(self) -> range:
        """The steps that `profile` names; none if it is '' or not of its form."""
        found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", self.profile)
        if found is None:
            return range(0)
        start, count = int(found[1]), int(found[2])
        return range(start, start + count)


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
      model: of the family that model.kind names.
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
