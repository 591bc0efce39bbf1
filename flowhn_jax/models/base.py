"""The config that every model family extends, and the groups of keys that several families share.

A family's config is a frozen dataclass of exactly the `model.*` keys that the family reads. Its
class attribute `kind` is its value of `model.kind`; see `models.registry`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from flowhn_jax.layers.attention import AttentionSizes
from flowhn_jax.layers.mamba1 import Mamba1Sizes
from flowhn_jax.layers.mamba2 import Mamba2Sizes
from flowhn_jax.layers.rope import RopeScaling
from flowhn_jax.split import AnyBlockPlan, Plan
from flowhn_jax.split.plan import SHARED
from flowhn_jax.utils.checks import nearest_multiples, require, require_divisor, require_positive
from flowhn_jax.utils.limits import MAX_BLOCKS, MAX_INT, MAX_POSITIONS
from kernels.backends import target_platform

DTYPES = ("auto", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Keys that every model family reads; the base class of their configs.

    Attributes:
      vocab_size: V, number of token ids.
      context: N, tokens of a training window; FlowHN plans its split for this length.
      width: D, size of the residual stream.
      blocks: number of FlowHN's blocks, or of a baseline's layers.
      norm_eps: added to the mean square in RMS norms.
      init_std: standard deviation of the normal initial weights.
      dtype: type of matrix products: 'float32', 'bfloat16', or 'auto', which is float32 on a CPU
        and bfloat16 elsewhere. Parameters are float32 in any case.
      tie_embeddings: whether the head's matrix is the embedding's table, transposed, instead of a
        parameter of its own.
    """

    kind: ClassVar[str]
    has_branches: ClassVar[bool] = False  # whether blocks have an attention and an SSM branch

    vocab_size: int = 65536
    context: int = 1024
    width: int = 768
    blocks: int = 2
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: str = "auto"
    tie_embeddings: bool = False

    def __post_init__(self):
        sizes = "vocab_size", "context", "width", "blocks"
        require_positive(self, "model", *sizes, "norm_eps", "init_std")
        for name, most in (("context", MAX_POSITIONS), ("blocks", MAX_BLOCKS)):
            value = getattr(self, name)
            require(value <= most, f"model.{name}", f"at most {most}", value)
        require(self.dtype in DTYPES, "model.dtype", f"one of {', '.join(DTYPES)}", self.dtype)

    @property
    def name(self) -> str:
        """The name in tables and log lines: FlowHN's strategy, otherwise the kind."""
        return self.kind

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of matrix products on the target platform."""
        if self.dtype != "auto":
            return jnp.dtype(self.dtype)
        return jnp.dtype(jnp.float32 if target_platform() == "cpu" else jnp.bfloat16)

    @property
    def max_length(self) -> int | None:
        """The maximum number of tokens of a sequence; None: no limit."""
        return None

    @property
    def can_decode(self) -> bool:
        """Whether the model can decode one token at a time, with caches."""
        return True

    @property
    def is_mamba2(self) -> bool:
        """Whether the state-space mixers are Mamba-2's."""
        return False

    @property
    def prefix_tokens(self) -> int:
        """The number of learned tokens before every sequence."""
        return 0

    @property
    def attention_heads(self) -> int | None:
        """The number of query heads; None without attention."""
        return None

    def plan(self, length: int | None = None) -> Plan:
        """Return the split of `length` tokens; None: of the whole context.

        Raises:
          ValueError: the model is a baseline, which has no split, or the split cannot be made for
            this length (`make_plan`).
        """
        del length
        raise ValueError(f"model.kind must be 'flowhn' for a plan of its split; got {self.kind!r}.")

    def block_plans(self, length: int) -> tuple[AnyBlockPlan, ...]:
        """Return the positions of `length` that each block's branches get; all without a split.

        Raises:
          ValueError: the split cannot be made for this length (`make_plan`).
        """
        del length
        return (SHARED,) * self.blocks

    def warning(self) -> str | None:
        """Return what a user should know about the model before training it; None: nothing."""
        return None

    def check_sequence(self, sequence: int, tensor: int) -> None:
        """Raise ValueError if positions or heads do not divide over the mesh.

        XLA would accept the mesh, but devices along `sequence` would repeat each other's work.

        Args:
          sequence: mesh.sequence, devices along a sequence's positions.
          tensor: mesh.tensor, devices along heads.
        """
        if sequence == 1:
            return
        self._check_positions(sequence)
        heads, ways = self.attention_heads, sequence * tensor
        if heads is not None and heads % ways:
            raise ValueError(
                f"mesh.sequence x mesh.tensor must divide model.heads ({heads}), over which "
                f"attention is sharded instead of positions; got {ways}."
            )

    def _check_positions(self, sequence: int) -> None:
        positions = self.context + self.prefix_tokens
        if positions % sequence:
            raise ValueError(
                f"mesh.sequence must divide the {positions} positions of {self.kind}; got "
                f"{sequence}."
            )


@dataclasses.dataclass(frozen=True)
class AttentionKeys(ModelConfig):
    """Keys of families with attention and MLPs.

    Attributes:
      mlp_width: F, hidden units of an MLP.
      heads: H, query heads of attention.
      kv_heads: G, key-value heads, each shared by model.heads / model.kv_heads query heads.
    """

    mlp_width: int = 2048
    heads: int = 32
    kv_heads: int = 8

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "model", "mlp_width", "heads", "kv_heads")
        require(
            self.heads % self.kv_heads == 0,
            "model.heads",
            f"a multiple of model.kv_heads ({self.kv_heads}), "
            + nearest_multiples(self.heads, self.kv_heads),
            self.heads,
        )

    @property
    def attention_heads(self) -> int | None:
        """The number of query heads."""
        return self.heads

    @property
    def head_size(self) -> int:
        """K, the size of an attention head."""
        raise NotImplementedError

    @property
    def attention_sizes(self) -> AttentionSizes:
        """The sizes of an attention layer."""
        return AttentionSizes(self.width, self.heads, self.kv_heads, self.head_size)


@dataclasses.dataclass(frozen=True)
class HeadDimKeys(AttentionKeys):
    """Keys of families whose heads can have any size.

    Attributes:
      head_dim: K, size of an attention head; None: model.width / model.heads.
    """

    head_dim: int | None = None

    def __post_init__(self):
        if self.head_dim is not None:
            require_positive(self, "model", "head_dim")
        elif self.heads > 0:
            require(
                self.width % self.heads == 0,
                "model.width",
                f"a multiple of model.heads ({self.heads}), "
                + nearest_multiples(self.width, self.heads),
                self.width,
            )
        super().__post_init__()

    @property
    def head_size(self) -> int:
        """K, the size of an attention head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim


@dataclasses.dataclass(frozen=True)
class RotaryKeys(AttentionKeys):
    """Keys of families with rotary positions.

    Attributes:
      rope_theta: base of the frequencies of rotary positions.
    """

    rope_theta: float = 10000.0

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "model", "rope_theta")
        require(
            self.head_size % 2 == 0,
            "the size of a head (model.head_dim)",
            "even for rotary positions",
            self.head_size,
        )


@dataclasses.dataclass(frozen=True)
class ScaledRotaryKeys(RotaryKeys):
    """Keys of families whose rotary frequencies can be scaled for longer contexts.

    Attributes:
      rope_scaling: how the rotary frequencies are changed.
    """

    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)

    def __post_init__(self):
        super().__post_init__()
        if self.rope_scaling.type == "yarn":
            require(self.rope_theta > 1, "model.rope_theta", "above 1 for yarn", self.rope_theta)
        original = self.max_length
        if original is not None:
            size = self.head_size
            require(size > 2, "the size of a head (model.head_dim)", "above 2 for dynamic", size)
            # Beyond it, logits would depend on the padding and the other documents of a row.
            most = f"at most model.rope_scaling.original_context ({original}) for dynamic scaling"
            require(self.context <= original, "model.context", most, self.context)

    @property
    def max_length(self) -> int | None:
        """The tokens up to which dynamic scaling is the same at every length; None: no limit."""
        scaling = self.rope_scaling
        return scaling.original_context if scaling.type == "dynamic" else None


@dataclasses.dataclass(frozen=True)
class StateSpaceKeys(ModelConfig):
    """Keys of families with a state-space mixer.

    Attributes:
      ssm_state: S, states of a channel.
      ssm_conv: W, taps of the causal convolution.
      ssm_expand: channels of the mixer as a multiple of model.width: E = ssm_expand * width.
    """

    ssm_state: int = 16
    ssm_conv: int = 4
    ssm_expand: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "model", "ssm_state", "ssm_conv", "ssm_expand")
        inner = self.ssm_expand * self.width
        most = f"at most {MAX_INT} / model.width"
        require(inner <= MAX_INT, "model.ssm_expand", most, self.ssm_expand)
        whole = f"such that its product with model.width ({self.width}) is whole"
        # A quotient of two integers may miss the whole product by its rounding.
        is_whole = abs(inner - self.inner) <= 1e-12 * inner
        require(is_whole, "model.ssm_expand", whole, self.ssm_expand)

    @property
    def inner(self) -> int:
        """E, channels of a mixer."""
        return round(self.ssm_expand * self.width)


@dataclasses.dataclass(frozen=True)
class Mamba1Keys(StateSpaceKeys):
    """Keys of families with Mamba-1 mixers.

    Attributes:
      ssm_dt_rank: R, rank of the projection to Mamba-1's time step; None: model.width / 16,
        rounded up.
    """

    ssm_dt_rank: int | None = None

    def __post_init__(self):
        super().__post_init__()
        rank = self.ssm_dt_rank
        require(rank is None or rank > 0, "model.ssm_dt_rank", "above 0, or None", rank)

    @property
    def dt_rank(self) -> int:
        """R, the rank of the projection to the time step."""
        return -(-self.width // 16) if self.ssm_dt_rank is None else self.ssm_dt_rank

    @property
    def mamba1_sizes(self) -> Mamba1Sizes:
        """The sizes of a mixer."""
        return Mamba1Sizes(self.width, self.inner, self.ssm_state, self.ssm_conv, self.dt_rank)


@dataclasses.dataclass(frozen=True)
class Mamba2Keys(StateSpaceKeys):
    """Keys of families with Mamba-2 mixers.

    Attributes:
      ssm_head_dim: P, channels of a Mamba-2 head.
      ssm_groups: G, groups of Mamba-2's heads; the heads of a group share B and C.
    """

    ssm_head_dim: int = 64
    ssm_groups: int = 1

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "model", "ssm_head_dim", "ssm_groups")
        if self.is_mamba2:
            inner = "model.ssm_expand * model.width"
            require_divisor(self.inner, inner, "model.ssm_head_dim", self.ssm_head_dim)
            heads = "the number of heads"
            require_divisor(self.ssm_heads, heads, "model.ssm_groups", self.ssm_groups)

    @property
    def is_mamba2(self) -> bool:
        """Whether the state-space mixers are Mamba-2's."""
        return True

    @property
    def ssm_heads(self) -> int:
        """H, heads of a mixer."""
        return self.inner // self.ssm_head_dim

    @property
    def mamba2_sizes(self) -> Mamba2Sizes:
        """The sizes of a mixer."""
        sizes = self.width, self.inner, self.ssm_state, self.ssm_conv
        return Mamba2Sizes(*sizes, self.ssm_head_dim, self.ssm_groups)
