"""Configuration: an ml_collections ConfigDict in, frozen and validated dataclasses out.

The dataclasses are the one place that names the keys, their types and their defaults. `default()`
gives them as a ConfigDict for the recipes under `configs/`, `parse()` takes such a ConfigDict (or a
plain nested dict, as in a workdir's config.json) back.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from flowhn_jax.split import BranchDims, Plan, SplitConfig, is_bounded, make_plan
from flowhn_jax.utils import typed
from flowhn_jax.utils.limits import MAX_BLOCKS, MAX_INT, MAX_POSITIONS
from flowhn_jax.utils.text import short_repr
from kernels.operations import check_backends

BASELINES = ("llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "falcon_h1")
KINDS = ("flowhn", *BASELINES)
DTYPES = ("auto", "float32", "bfloat16")
SSMS = ("mamba1", "mamba2")
REMATS = ("none", "dots", "full")

_WITH_ATTENTION = ("flowhn", "llama", "jamba", "shm", "hymba", "falcon_h1")
_WITH_SSM = ("flowhn", "mamba1", "mamba2", "jamba", "shm", "hymba", "falcon_h1")
_WITH_MAMBA2 = ("flowhn", "mamba2", "falcon_h1")
# The kinds of model that read a key of `model`; where a key is not here, all do.
_READ_BY = {
    "mlp_width": _WITH_ATTENTION,
    "heads": _WITH_ATTENTION,
    "kv_heads": _WITH_ATTENTION,
    "head_dim": ("flowhn", "llama", "jamba", "shm", "falcon_h1"),
    "rope_theta": ("llama", "hymba", "falcon_h1"),
    "attention_period": ("jamba",),
    "attention_offset": ("jamba",),
    "meta_tokens": ("hymba",),
    "window": ("hymba",),
    "ssm": ("flowhn",),
    "ssm_state": _WITH_SSM,
    "ssm_conv": _WITH_SSM,
    "ssm_expand": _WITH_SSM,
    "ssm_dt_rank": ("flowhn", "mamba1", "jamba", "shm", "hymba"),
    "ssm_head_dim": _WITH_MAMBA2,
    "ssm_groups": _WITH_MAMBA2,
    "branch_mlp": ("flowhn",),
    "multipliers": ("falcon_h1",),
    "split": ("flowhn",),
}


def reads(kind: str, key: str) -> bool:
    """Whether models of a kind read a key of `model`."""
    return kind in _READ_BY.get(key, KINDS)


def _require(ok: bool, key: str, found: Any, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{key} is {short_repr(found)}; accepted is {accepted}.")


def _require_positive(config: Any, prefix: str, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) > 0, f"{prefix}.{name}", getattr(config, name), "above 0")


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """Falcon-H1's factors on its activations (arXiv 2507.22448, section 3.2.3)."""

    embedding: float = 1.0
    head: float = 1.0
    attention_in: float = 1.0
    attention_out: float = 1.0
    key: float = 1.0
    ssm_in: float = 1.0
    ssm_out: float = 1.0
    ssm_z: float = 1.0  # these five on the parts of what the mixer's in_proj makes
    ssm_x: float = 1.0
    ssm_b: float = 1.0
    ssm_c: float = 1.0
    ssm_dt: float = 1.0
    mlp_gate: float = 1.0
    mlp_down: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model, FlowHN or a baseline; the defaults are the paper's FlowHN 135M.

    A key that the kind of model does not read is refused unless it has its default.
    """

    kind: str = "flowhn"  # or one of BASELINES
    vocab_size: int = 65536
    context: int = 1024  # N, the length that the split is planned for
    width: int = 768
    mlp_width: int = 2048
    blocks: int = 2  # of a baseline: its layers
    heads: int = 32
    kv_heads: int = 8
    head_dim: int | None = None  # None: width / heads
    rope_theta: float = 10000.0  # base of the rotary positions (of llama, hymba, falcon_h1)
    attention_period: int = 8  # of jamba: one layer of so many attends,
    attention_offset: int = 4  # that with this index among them
    meta_tokens: int = 128  # of hymba, before every sequence
    window: int = 1024  # of hymba's attention but in the first, middle and last layer
    ssm: str = "mamba1"  # or 'mamba2', of flowhn
    ssm_state: int = 16
    ssm_conv: int = 4
    ssm_expand: float = 2.0  # channels of the mixer, over the width
    ssm_dt_rank: int | None = None  # of mamba1; None: width / 16, rounded up
    ssm_head_dim: int = 64  # of mamba2
    ssm_groups: int = 1  # of mamba2's heads, which share B and C
    branch_mlp: bool = True  # False: the paper's figure, without MLPs in the branches
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: str = "auto"  # of matrix products; 'auto': bfloat16, but float32 on a CPU
    multipliers: Multipliers = dataclasses.field(default_factory=Multipliers)  # of falcon_h1
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)

    def __post_init__(self):
        _require(self.kind in KINDS, "model.kind", self.kind, f"one of {', '.join(KINDS)}")
        self._check_unread()
        sizes = ("vocab_size", "context", "width", "mlp_width", "blocks", "heads", "kv_heads")
        _require_positive(self, "model", *sizes, "ssm_state", "ssm_conv", "ssm_expand")
        _require_positive(self, "model", "ssm_head_dim", "ssm_groups", "norm_eps", "init_std")
        _require_positive(self, "model", "rope_theta", "attention_period", "meta_tokens", "window")
        for name, most in (("context", MAX_POSITIONS), ("blocks", MAX_BLOCKS)):
            value = getattr(self, name)
            _require(value <= most, f"model.{name}", value, f"at most {most}")
        is_small = self.ssm_expand * self.width <= MAX_INT
        accepted = f"at most {MAX_INT} / model.width"
        _require(is_small, "model.ssm_expand", self.ssm_expand, accepted)
        _require(self.dtype in DTYPES, "model.dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if reads(self.kind, "heads"):
            self._check_heads()
        if reads(self.kind, "ssm_state"):
            self._check_ssm()
        period, offset = self.attention_period, self.attention_offset
        accepted = f"0 to model.attention_period - 1 = {period - 1}"
        _require(0 <= offset < period, "model.attention_offset", offset, accepted)
        stem = self.split.stem
        _require(stem <= self.blocks, "model.split.stem", stem, f"0 to model.blocks={self.blocks}")

    def _check_unread(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            made = field.default is dataclasses.MISSING
            default = field.default_factory() if made else field.default
            if value != default and not reads(self.kind, field.name):
                raise ValueError(
                    f"model.{field.name} is {short_repr(value)}, but model.kind {self.kind!r} does not "
                    f"read it; accepted is its default, {default!r}."
                )

    def _check_heads(self) -> None:
        width = self.width
        if self.kind == "hymba":
            _require(
                self.inner % self.heads == 0,
                "model.heads",
                self.heads,
                f"a divisor of model.ssm_expand * model.width = {self.inner}",
            )
        elif self.head_dim is None:
            _require(
                width % self.heads == 0,
                "model.width",
                width,
                f"a multiple of model.heads = {self.heads}, "
                + _nearest_multiples(width, self.heads),
            )
        else:
            _require_positive(self, "model", "head_dim")
        _require(
            self.heads % self.kv_heads == 0,
            "model.heads",
            self.heads,
            f"a multiple of model.kv_heads = {self.kv_heads}, "
            + _nearest_multiples(self.heads, self.kv_heads),
        )
        size = self.dims.head_dim
        if reads(self.kind, "rope_theta"):
            _require(size % 2 == 0, "the size of a head", size, "an even one, for rotary positions")

    def _check_ssm(self) -> None:
        inner, rank = self.ssm_expand * self.width, self.ssm_dt_rank
        accepted = f"one whose product with model.width = {self.width} is whole"
        _require(inner == self.inner, "model.ssm_expand", self.ssm_expand, accepted)
        _require(rank is None or rank > 0, "model.ssm_dt_rank", rank, "above 0, or None")
        _require(self.ssm in SSMS, "model.ssm", self.ssm, f"one of {', '.join(SSMS)}")
        if self.is_mamba2:
            _require(
                self.inner % self.ssm_head_dim == 0,
                "model.ssm_head_dim",
                self.ssm_head_dim,
                f"a divisor of model.ssm_expand * model.width = {self.inner}",
            )
            _require(
                self.inner // self.ssm_head_dim % self.ssm_groups == 0,
                "model.ssm_groups",
                self.ssm_groups,
                f"a divisor of the {self.inner // self.ssm_head_dim} heads",
            )

    @property
    def name(self) -> str:
        """What tells models of one size apart: FlowHN's strategy, else the kind."""
        return self.split.strategy if self.kind == "flowhn" else self.kind

    @property
    def inner(self) -> int:
        """E, channels of an SSM mixer."""
        return int(self.ssm_expand * self.width)

    @property
    def is_mamba2(self) -> bool:
        """Whether its SSM mixers are Mamba-2's."""
        return self.kind in ("mamba2", "falcon_h1") or self.ssm == "mamba2"

    @property
    def dims(self) -> BranchDims:
        """Sizes of the mixers and the MLP."""
        head_dim = self.inner // self.heads if self.kind == "hymba" else self.head_dim
        return BranchDims(
            width=self.width,
            mlp_width=self.mlp_width if self.branch_mlp else 0,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.width // self.heads if head_dim is None else head_dim,
            inner=self.inner,
            state=self.ssm_state,
            conv=self.ssm_conv,
            dt_rank=0 if self.is_mamba2 else self.ssm_dt_rank or math.ceil(self.width / 16),
            ssm_heads=self.inner // self.ssm_head_dim if self.is_mamba2 else 0,
            ssm_groups=self.ssm_groups if self.is_mamba2 else 0,
        )

    @property
    def max_length(self) -> int | None:
        """Tokens that a sequence can have; None: any number."""
        bounded = self.kind == "flowhn" and is_bounded(self.split, self.blocks)
        return self.context if bounded else None

    def plan(self, length: int | None = None) -> Plan:
        """The split of a sequence of `length` tokens; None: of the whole context.

        Raises:
          ValueError: the model is a baseline, which has no split, or as of `make_plan`.
        """
        if self.kind != "flowhn":
            raise ValueError(f"model.kind {self.kind!r} has no split; accepted is 'flowhn'.")
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
    keep_checkpoints: int = 2  # the newest; the best by validation loss is kept beside them
    keep_every: int = 0  # checkpoints of multiples of so many steps stay for good; 0: none
    max_skipped: int = 10  # steps in a row without finite numbers, at which the run stops,
    rewinds: int = 0  # but for so often goes back to the last good checkpoint, past their data
    debug_nans: bool = False  # stop at the operation that makes the first NaN; slow
    hang_minutes: float = 30.0  # without the end of a step, after which stacks are shown

    def __post_init__(self):
        positive = ("steps", "batch_size", "accumulate", "learning_rate", "epsilon")
        cadence = ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        cadence += ("max_skipped", "hang_minutes")
        _require_positive(self, "train", *positive, *cadence)
        for name in ("final_learning_rate", "warmup"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"train.{name}", value, "0 to 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"train.{name}", value, "0 or more and below 1")
        least_zero = ("weight_decay", "clip_norm", "z_loss", "eval_windows", "seed")
        for name in (*least_zero, "keep_every", "rewinds"):
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

    def __post_init__(self):
        alone = self.mesh.branch == 2 and self.model.kind != "flowhn"
        _require(not alone, "mesh.branch", 2, f"1 for model.kind {self.model.kind!r}")


def _nearest_multiples(found: int, base: int) -> str:
    below, above = found // base * base, (found // base + 1) * base
    return f"such as {below} or {above}" if below else f"such as {above}"


def parse(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Validates a ConfigDict or nested dict; keys that are not there take their defaults.

    Raises:
      ValueError: an unknown key, a value of the wrong type or outside its range; the message names
        the key, what was found and what is accepted.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    return typed.build(Config, config, what="config key", most=MAX_INT)


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
                kinds = typing.get_args(hints[field.name])
                kind = next(kind for kind in kinds if kind is not type(None))
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
            found.append(f"{prefix}{name}: {short_repr(before)} -> {short_repr(after)}")
    return found
