"""The config of FlowHN: the keys of both branches, and the split."""

import dataclasses
from typing import ClassVar

from flowhn_jax.models.base import HeadDimKeys, Mamba1Keys, Mamba2Keys, ModelConfig
from flowhn_jax.split import AnyBlockPlan, BranchDims, Plan, SplitConfig, is_bounded, make_plan
from flowhn_jax.split.plan import partition_warning
from flowhn_jax.split.selection import EVERYTHING, Quota, Selection
from flowhn_jax.utils.checks import require

SSMS = ("mamba1", "mamba2")
FUSIONS = ("paper", "residual")


@dataclasses.dataclass(frozen=True)
class FlowHNConfig(Mamba2Keys, Mamba1Keys, HeadDimKeys):
    """What FlowHN reads: the keys of both branches, and the split; defaults are the paper's 135M.

    Inherited keys: those of every model (`ModelConfig`); mlp_width, heads, kv_heads and head_dim of
    attention; ssm_state, ssm_conv, ssm_expand, ssm_dt_rank, ssm_head_dim and ssm_groups of the SSM.

    Attributes:
      ssm: mixer of the SSM branch, 'mamba1' or 'mamba2'.
      attention_mlp_width: hidden units of the attention branch's MLP; 0: model.mlp_width. With a
        wider one, a balance by FLOPs sends the branch fewer tokens.
      attention_rope_theta: base of the rotary positions in the attention branch, which are those of
        the whole sequence; 0: none, as in the paper.
      branch_mlp: an MLP after each branch's mixer; False: none, as in the paper's figure.
      fusion: how the branches' outputs enter the residual stream: 'paper' projects them twice, each
        time with a residual; 'residual' has no parameters: each branch's update is added.
      split: which tokens go to which branch.
    """

    kind: ClassVar[str] = "flowhn"
    has_branches: ClassVar[bool] = True

    ssm: str = "mamba1"
    attention_mlp_width: int = 0
    attention_rope_theta: float = 0.0
    branch_mlp: bool = True
    fusion: str = "paper"
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)

    def __post_init__(self):
        for name, known in (("ssm", SSMS), ("fusion", FUSIONS)):
            value = getattr(self, name)
            require(value in known, f"model.{name}", f"one of {', '.join(known)}", value)
        super().__post_init__()
        mlp_width = self.attention_mlp_width
        require(mlp_width >= 0, "model.attention_mlp_width", "0 or above", mlp_width)
        no_mlp = "0 where model.branch_mlp is False"
        require(self.branch_mlp or not mlp_width, "model.attention_mlp_width", no_mlp, mlp_width)
        theta, size = self.attention_rope_theta, self.head_size
        require(theta >= 0, "model.attention_rope_theta", "0 or above", theta)
        if theta:
            head = "the size of a head (model.head_dim)"
            require(size % 2 == 0, head, "even for model.attention_rope_theta", size)
        stem, most = self.split.stem, f"0 to model.blocks ({self.blocks})"
        require(stem <= self.blocks, "model.split.stem", most, stem)

    @property
    def name(self) -> str:
        """The split strategy, which tells FlowHN's variants apart."""
        return self.split.strategy

    @property
    def is_mamba2(self) -> bool:
        """Whether the SSM branch is Mamba-2."""
        return self.ssm == "mamba2"

    @property
    def dims(self) -> BranchDims:
        """The sizes of both branches, by which the split is balanced."""
        return BranchDims(
            width=self.width,
            mlp_width=self.branch_mlp_width("ssm"),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_size,
            inner=self.inner,
            state=self.ssm_state,
            conv=self.ssm_conv,
            dt_rank=0 if self.is_mamba2 else self.dt_rank,
            ssm_heads=self.ssm_heads if self.is_mamba2 else 0,
            ssm_groups=self.ssm_groups if self.is_mamba2 else 0,
            attention_mlp_width=self.attention_mlp_width or None,
        )

    def branch_mlp_width(self, branch: str) -> int:
        """Return the hidden units of the MLP of 'ssm' or 'attention', 0 without one."""
        if not self.branch_mlp:
            return 0
        if branch == "attention" and self.attention_mlp_width:
            return self.attention_mlp_width
        return self.mlp_width

    @property
    def max_length(self) -> int | None:
        """The largest length, if the strategy has no branch for later positions; None: no limit."""
        return self.context if is_bounded(self.split, self.blocks) else None

    @property
    def can_decode(self) -> bool:
        """Whether the plan of a sequence stays the same when it grows by a token."""
        return self.split.scope == "context"

    def plan(self, length: int | None = None) -> Plan:
        """Return the split of `length` tokens; None: of the whole context.

        Raises:
          ValueError: `make_plan` raises it.
        """
        return make_plan(
            self.split, self.dims, blocks=self.blocks, context=self.context, length=length
        )

    def block_plans(self, length: int) -> tuple[AnyBlockPlan, ...]:
        """Return which positions of `length` the branches of each block get."""
        return self.plan(length).blocks

    def warning(self) -> str | None:
        """Return a warning if the plan lets nothing pass between two sets of positions."""
        return partition_warning(self.split, self.plan())

    def _check_positions(self, sequence: int) -> None:
        for block in self.plan().blocks:
            divided: list[tuple[str, Selection | Quota]] = [
                ("attention", block.attention),
                ("the SSM", block.ssm),
            ]
            if block.reads_all:
                divided.append(("both branches", EVERYTHING))
            for branch, selection in divided:
                tokens = selection.count(self.context)
                if tokens % sequence:
                    raise ValueError(
                        f"mesh.sequence must divide the {tokens} tokens of {branch} in a context "
                        f"of {self.context}; got {sequence}. Give a divisor, or another "
                        "model.split.align or model.split.period."
                    )


def require_flowhn(model: ModelConfig, command: str) -> FlowHNConfig:
    """Return `model` as the FlowHN config that a command needs.

    Raises:
      ValueError: it is a baseline, which has neither branches nor a split.
    """
    if not isinstance(model, FlowHNConfig):
        raise ValueError(f"model.kind must be 'flowhn' for {command}; got {model.kind!r}.")
    return model
