"""Plans: which positions each branch gets, block by block."""

import dataclasses
import functools
import logging
from typing import ClassVar

from flowhn_jax.split import measured
from flowhn_jax.split.config import SplitConfig
from flowhn_jax.split.cost import BranchDims, balanced_tokens
from flowhn_jax.split.selection import EVERYTHING, NOTHING, Quota, Selection
from flowhn_jax.split.strategies import STRATEGIES
from kernels.backends import target_device_kind

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """The positions of both branches in one block: complements, or all of them for both.

    A block of the stem with one branch gives it all positions and the other branch none.

    Attributes:
      attention: positions that attention has outputs for.
      ssm: positions that the SSM has outputs for.
      reads_all: whether both branches read all positions, and not only their own.
    """

    attention: Selection
    ssm: Selection
    reads_all: bool = False

    @property
    def is_split(self) -> bool:
        """False where both branches see every position."""
        return self.attention != self.ssm

    @property
    def reads(self) -> tuple[Selection, Selection]:
        """The positions that attention and the SSM read."""
        return (EVERYTHING, EVERYTHING) if self.reads_all else (self.attention, self.ssm)


@dataclasses.dataclass(frozen=True)
class LearnedBlockPlan:
    """How many positions both branches get in one block; the text decides which.

    It has the properties of a `BlockPlan`.

    Attributes:
      attention: the number of positions that attention reads and has outputs for.
      ssm: that of the SSM, which gets the others.
    """

    attention: Quota
    ssm: Quota

    is_split: ClassVar[bool] = True
    reads_all: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[Quota, Quota]:
        """The numbers of positions that attention and the SSM read."""
        return self.attention, self.ssm


AnyBlockPlan = BlockPlan | LearnedBlockPlan

SHARED = BlockPlan(EVERYTHING, EVERYTHING)
_STEMS = {
    "no_split": SHARED,
    "ssm": BlockPlan(NOTHING, EVERYTHING),
    "attention": BlockPlan(EVERYTHING, NOTHING),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The split of a sequence of `length` positions, block by block."""

    length: int
    blocks: tuple[AnyBlockPlan, ...]

    @property
    def is_learned(self) -> bool:
        """Whether the text decides in some block which positions a branch gets."""
        return any(isinstance(block, LearnedBlockPlan) for block in self.blocks)

    @property
    def is_partitioned(self) -> bool:
        """True where all blocks divide the positions into the same two sets.

        Then nothing passes between the two sets: the model is two language models that share a
        head. Blocks with a learned split have different sets.
        """
        cuts = {frozenset(block.reads) for block in self.blocks}
        is_single = len(cuts) == 1 and EVERYTHING not in next(iter(cuts))
        return is_single and (len(self.blocks) == 1 or not self.is_learned)


def with_fixed_share(split: SplitConfig, dims: BranchDims, length: int) -> SplitConfig:
    """Return `split` with a balance by time replaced by the share that it gives attention now.

    A model is trained and used with one plan, whatever is measured later or on other devices.
    """
    if split.balance != "time":
        return split
    share = min(max(attention_tokens(split, dims, length), 1), length - 1) / length
    if share == 0.5:  # in a config, 0.5 means that the user wants halves, even if they only swap
        share = 0.5 - 0.25 / length
    return dataclasses.replace(split, balance=share)


def attention_tokens(split: SplitConfig, dims: BranchDims, length: int) -> int:
    """Return attention's tokens of `length` by `split.balance`, before rounding.

    'time' uses what was measured on the device that is compiled for; without measurements it
    logs a warning and balances by FLOPs.
    """
    if split.balance == "time":
        kind = target_device_kind()
        if times := measured.load(kind, dims):
            return times.balanced_tokens(length)
        _warn_unmeasured(kind)
    if split.balance in ("flops", "time"):
        return balanced_tokens(dims, length, reads_all=split.reads == "all")
    share = 0.5 if isinstance(split.balance, str) else split.balance
    return round(share * length)


@functools.cache
def _warn_unmeasured(kind: str) -> None:
    _log.warning(
        "model.split.balance is 'time', but the branches were not measured on %s: balancing by "
        "FLOPs. To measure, run `python -m flowhn_jax.bench branches` with this config there.",
        kind,
    )


@functools.lru_cache(maxsize=256)
def make_plan(
    split: SplitConfig,
    dims: BranchDims,
    *,
    blocks: int,
    context: int,
    length: int | None = None,
) -> Plan:
    """Return the plan of a sequence.

    Args:
      split: the user's choices.
      dims: sizes of the branches, for the balance.
      blocks: number of blocks, stem included.
      context: N, the length that the model is made for.
      length: number of positions; None: `context`. With scope 'context' the plan for N is
        restricted to them; with scope 'sequence' a plan for N = `length` is made.

    Raises:
      ValueError: `length` is below 1, or above the context of a bounded strategy.
    """
    length = context if length is None else length
    if length < 1:
        raise ValueError(f"A sequence must have at least 1 position; got {length}.")
    if split.scope == "sequence":
        context = length
    elif length > context and is_bounded(split, blocks):
        unbounded = [name for name, strategy in STRATEGIES.items() if not strategy.is_bounded]
        raise ValueError(
            f"The sequence has {length} positions, but {split.strategy} was planned for a context "
            f"of {context}: use at most {context}, or a strategy for any length "
            f"({', '.join(unbounded)})."
        )
    strategy_class = split.strategy_class
    block_plans: list[AnyBlockPlan] = [_STEMS[split.stem_kind]] * min(split.stem, blocks)
    if not strategy_class.is_split or blocks <= split.stem:
        return Plan(length, (*block_plans, *[SHARED] * (blocks - len(block_plans))))
    tokens = attention_tokens(split, dims, context) if strategy_class.uses_balance else 0
    strategy = strategy_class(split, context, tokens)
    for block in range(blocks - split.stem):
        attention = strategy.selection(block)
        if isinstance(attention, Quota):
            block_plans.append(LearnedBlockPlan(attention, attention.complement()))
            continue
        reads_all = split.reads == "all"
        block_plans.append(BlockPlan(attention, attention.complement(), reads_all))
    return Plan(length, tuple(block_plans))


def is_bounded(split: SplitConfig, blocks: int) -> bool:
    """Return whether positions past the context have no branch."""
    return split.strategy_class.is_bounded and split.stem < blocks


def partition_warning(split: SplitConfig, plan: Plan) -> str | None:
    """Return a warning if nothing ever passes between two sets of positions; None otherwise."""
    if not plan.is_partitioned:
        return None
    return (
        f"{split.strategy} cuts the positions into the same two sets in every block, and nothing "
        "crosses between them. Set model.split.stem=1, or choose a strategy, balance and shift "
        "whose sets differ between blocks."
    )
