"""Configuration: an ml_collections ConfigDict in, frozen and validated dataclasses out.

The dataclasses are the one place that names the keys, their types and their defaults. `default()`
gives them as a ConfigDict for the recipes under `configs/`, `parse()` takes such a ConfigDict (or a
plain nested dict, as in a workdir's config.json) back.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from flowhn_jax.split import BranchDims, Plan, SplitConfig, make_plan
from kernels.operations import check_backends

DTYPES = ("auto", "float32", "bfloat16")
SSMS = ("mamba1", "mamba2")
REMATS = ("none", "dots", "full")


def _require(ok: bool, key: str, found: Any, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{key} is {found!r}; accepted is {accepted}.")


def _require_positive(config: Any, prefix: str, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) > 0, f"{prefix}.{name}", getattr(config, name), "above 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a FlowHN model; the defaults are the paper's 135M."""

    vocab_size: int = 65536
    context: int = 1024  # N, the length that the split is planned for
    width: int = 768
    mlp_width: int = 2048
    blocks: int = 2
    heads: int = 32
    kv_heads: int = 8
    ssm: str = "mamba1"  # or 'mamba2'
    ssm_state: int = 16
    ssm_conv: int = 4
    ssm_expand: int = 2
    ssm_dt_rank: int | None = None  # of mamba1; None: width / 16, rounded up
    ssm_head_dim: int = 64  # of mamba2
    ssm_groups: int = 1  # of mamba2's heads, which share B and C
    branch_mlp: bool = True  # False: the paper's figure, without MLPs in the branches
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: str = "auto"  # of matrix products; 'auto': bfloat16, but float32 on a CPU
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)

    def __post_init__(self):
        sizes = ("vocab_size", "context", "width", "mlp_width", "blocks", "heads", "kv_heads")
        _require_positive(self, "model", *sizes, "ssm_state", "ssm_conv", "ssm_expand")
        _require_positive(self, "model", "ssm_head_dim", "ssm_groups")
        _require_positive(self, "model", "norm_eps", "init_std")
        _require(
            self.width % self.heads == 0,
            "model.width",
            self.width,
            f"a multiple of model.heads = {self.heads}, "
            + _nearest_multiples(self.width, self.heads),
        )
        _require(
            self.heads % self.kv_heads == 0,
            "model.heads",
            self.heads,
            f"a multiple of model.kv_heads = {self.kv_heads}, "
            + _nearest_multiples(self.heads, self.kv_heads),
        )
        rank = self.ssm_dt_rank
        _require(rank is None or rank > 0, "model.ssm_dt_rank", rank, "above 0, or None")
        _require(self.ssm in SSMS, "model.ssm", self.ssm, f"one of {', '.join(SSMS)}")
        if self.ssm == "mamba2":
            inner = self.ssm_expand * self.width
            _require(
                inner % self.ssm_head_dim == 0,
                "model.ssm_head_dim",
                self.ssm_head_dim,
                f"a divisor of model.ssm_expand * model.width = {inner}",
            )
            _require(
                inner // self.ssm_head_dim % self.ssm_groups == 0,
                "model.ssm_groups",
                self.ssm_groups,
                f"a divisor of the {inner // self.ssm_head_dim} heads",
            )
        _require(self.dtype in DTYPES, "model.dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        stem = self.split.stem
        _require(stem <= self.blocks, "model.split.stem", stem, f"0 to model.blocks={self.blocks}")

    @property
    def dims(self) -> BranchDims:
        """Sizes of the two branches."""
        inner, is_mamba2 = self.ssm_expand * self.width, self.ssm == "mamba2"
        return BranchDims(
            width=self.width,
            mlp_width=self.mlp_width if self.branch_mlp else 0,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            inner=inner,
            state=self.ssm_state,
            conv=self.ssm_conv,
            dt_rank=0 if is_mamba2 else self.ssm_dt_rank or math.ceil(self.width / 16),
            ssm_heads=inner // self.ssm_head_dim if is_mamba2 else 0,
            ssm_groups=self.ssm_groups if is_mamba2 else 0,
        )

    def plan(self, length: int | None = None) -> Plan:
        """The split of a sequence of `length` tokens; None: of the whole context."""
        return make_plan(
            self.split, self.dims, blocks=self.blocks, context=self.context, length=length
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    path: str = ""  # folder made by `python -m flowhn_jax.data.prepare`; '': the embedded corpus
    seed: int = 0  # of the global shuffle

    def __post_init__(self):
        _require(self.seed >= 0, "data.seed", self.seed, "0 or more")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The recipe; optimizer and rates default to the paper's at 135M."""

    steps: int = 1000
    batch_size: int = 8  # sequences per step, over all devices
    accumulate: int = 1  # micro-batches per step; the update is that of one large batch
    learning_rate: float = 3e-4  # peak
    final_learning_rate: float = 0.1  # share of the peak at the end of the cosine
    warmup: float = 0.1  # share of the steps
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # of the global gradient norm; 0: no clipping
    z_loss: float = 0.0  # weight of the squared log-normalizer (arXiv 2204.02311, section 5)
    remat: str = "none"  # activations kept: all, matrix products' ('dots'), blocks' inputs ('full')
    seed: int = 0  # of the initial parameters
    log_every: int = 10
    eval_every: int = 100
    eval_windows: int = 0  # validation windows; 0: the whole validation set
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self):
        positive = ("steps", "batch_size", "accumulate", "learning_rate", "epsilon")
        cadence = ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        _require_positive(self, "train", *positive, *cadence)
        for name in ("final_learning_rate", "warmup"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"train.{name}", value, "0 to 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"train.{name}", value, "0 or more and below 1")
        for name in ("weight_decay", "clip_norm", "z_loss", "eval_windows", "seed"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name}", value, "0 or more")
        _require(
            self.batch_size % self.accumulate == 0,
            "train.batch_size",
            self.batch_size,
            f"a multiple of train.accumulate = {self.accumulate}, "
            + _nearest_multiples(self.batch_size, self.accumulate),
        )
        _require(self.remat in REMATS, "train.remat", self.remat, f"one of {', '.join(REMATS)}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1, for one of them at most: all that are left."""

    data: int = -1  # sequences
    fsdp: int = 1  # sequences, and parameters with their optimizer state
    branch: int = 1  # 2: the attention branch on one group of devices, the SSM on the other
    sequence: int = 1  # positions of long sequences, and parameters with their optimizer state
    tensor: int = 1  # heads, channels, MLP units and vocabulary

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size == -1 or size > 0, f"mesh.{name}", size, "-1 or above 0")
        _require(self.branch in (1, 2), "mesh.branch", self.branch, "1 or 2")
        left = [name for name, size in sizes.items() if size == -1]
        _require(len(left) <= 1, "mesh", sizes, "one axis of -1 at most")
        both = self.branch == 2 and self.sequence != 1
        _require(not both, "mesh.sequence", self.sequence, "1 where mesh.branch is 2")


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """Which backends run the operations under `kernels/`."""

    # 'auto', 'xla' or OPERATION=BACKEND,...; the variable FLOWHN_KERNELS_BACKEND goes before it
    backend: str = "auto"

    def __post_init__(self):
        check_backends(self.backend, "kernels.backend")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run needs."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)


def _nearest_multiples(found: int, base: int) -> str:
    below, above = found // base * base, (found // base + 1) * base
    return f"such as {below} or {above}" if below else f"such as {above}"


def _kinds(annotation: Any) -> tuple[type, ...]:
    """The types that a key takes."""
    is_union = isinstance(annotation, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _coerce(annotation: Any, value: Any, key: str) -> Any:
    """`value` as the key's type; an integer serves as a float, a numeral as a share."""
    kinds = _kinds(annotation)
    if str in kinds and float in kinds and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, bool) and bool not in kinds:
        pass
    elif isinstance(value, kinds):
        return value
    elif float in kinds and isinstance(value, int):
        return float(value)
    elif int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ValueError(f"{key} is {value!r}, a {type(value).__name__}; accepted is {names}.")


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix or 'The config'} is {values!r}; accepted is a group of keys.")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"Unknown config key {key!r}; the nearest is {prefix + near!r}. "
                f"Accepted here are {', '.join(hints)}."
            )
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = _build(hints[name], value, f"{key}.")
        else:
            arguments[name] = _coerce(hints[name], value, key)
    return cls(**arguments)


def parse(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Validates a ConfigDict or nested dict; keys that are not there take their defaults.

    Raises:
      ValueError: an unknown key, a value of the wrong type or outside its range; the message names
        the key, what was found and what is accepted.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    return _build(Config, config, "")


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


def default() -> ml_collections.ConfigDict:
    """All keys with their defaults, for recipes to start from and for flags to override."""

    def as_config_dict(config: Any) -> ml_collections.ConfigDict:
        hints = typing.get_type_hints(type(config))
        out = ml_collections.ConfigDict()
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                out[field.name] = as_config_dict(value)
            elif value is None:
                kind = next(k for k in _kinds(hints[field.name]) if k is not type(None))
                out[field.name] = config_dict.placeholder(kind)
            else:
                out[field.name] = value
        return out

    return as_config_dict(Config())


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ between two nested dicts, as 'key: old -> new'."""
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return found
