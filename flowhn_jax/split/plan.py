"""Strategies: the plan of which positions each branch gets in each block.

| strategy | block b of a context of N positions, a of them attention's                          |
|----------|-------------------------------------------------------------------------------------|
| no_split | both branches see all N                                                             |
| ae_split | alternating equal halves: even b SSM first half, attention second; odd b swapped    |
| fa_split | FLOP-aware: SSM the first N - a, attention the last a, in every block               |
| fac_split| FLOP-aware circulating: attention's window starts at the end and moves back by a    |
| fai_split| FLOP-aware interleaved: a run of r in every period of m, moving back by `shift`     |

The first four are the paper's (arXiv 2505.19472, section 3). Two more reproduce what the authors'
code does where it departs from the paper, and exist for parity with its checkpoints.
"""

import dataclasses
import functools
import itertools
import logging
import math

from flowhn_jax.split import measured
from flowhn_jax.split.cost import BranchDims, balanced_tokens
from kernels.backends import target_device_kind

STRATEGIES = ("no_split", "ae_split", "fa_split", "fac_split", "fai_split")
PARITY_STRATEGIES = ("fa_split_reference", "alternating_reference")
BALANCES = ("flops", "equal", "time")
SCOPES = ("context", "sequence")
_REFERENCE_ATTENTION_SHARE = 0.59  # a constant of the authors' code

_log = logging.getLogger(__name__)

Run = tuple[int, int]  # [start, stop)


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """What a user chooses of the split."""

    strategy: str = "fac_split"
    balance: str | float = "flops"  # 'flops', 'equal', 'time' or attention's share in (0, 1)
    align: int = 64  # attention's tokens are a multiple of this (not in ae_split, fai_split)
    period: int = 64  # m of fai_split
    shift: int | None = None  # of fai_split; None: half the run
    stem: int = 0  # first blocks that run no_split
    scope: str = "context"  # 'sequence' plans anew for each length: parity, no decoding

    def __post_init__(self):
        known = STRATEGIES + PARITY_STRATEGIES
        if self.strategy not in known:
            raise ValueError(
                f"split.strategy is {self.strategy!r:.80}; accepted are {', '.join(known)}."
            )
        if isinstance(self.balance, str):
            if self.balance not in BALANCES:
                raise ValueError(
                    f"split.balance is {self.balance!r:.80}; accepted are {', '.join(BALANCES)} "
                    "or a share of attention between 0 and 1."
                )
        elif not 0 < self.balance < 1:
            raise ValueError(
                f"split.balance is the share {self.balance}; accepted is 0 < share < 1."
            )
        if self.scope not in SCOPES:
            raise ValueError(
                f"split.scope is {self.scope!r:.80}; accepted are {', '.join(SCOPES)}."
            )
        if self.scope == "context" and self.strategy in PARITY_STRATEGIES:
            raise ValueError(
                f"split.strategy {self.strategy!r} exists for parity with the authors' code and "
                "needs split.scope='sequence'; found 'context'."
            )
        for name, least in (("align", 1), ("period", 3), ("stem", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"split.{name} is {getattr(self, name)}; accepted is {least} or more."
                )
        if self.shift is not None and not 0 <= self.shift < self.period:
            raise ValueError(
                f"split.shift is {self.shift}; accepted is 0 to split.period - 1 = "
                f"{self.period - 1}, or None for half the run."
            )


@dataclasses.dataclass(frozen=True)
class Selection:
    """Positions p with p mod `period` inside one of `runs`: ascending, disjoint, not touching."""

    period: int
    runs: tuple[Run, ...]

    def count(self, length: int) -> int:
        """Number of selected positions below `length`."""
        periods, tail = divmod(length, self.period)
        in_tail = sum(max(0, min(stop, tail) - start) for start, stop in self.runs)
        return periods * self.width + in_tail

    @property
    def width(self) -> int:
        """Selected positions in one whole period."""
        return sum(stop - start for start, stop in self.runs)

    def contains(self, position: int) -> bool:
        """Whether `position` is selected."""
        return any(start <= position % self.period < stop for start, stop in self.runs)

    def complement(self) -> "Selection":
        """All other positions."""
        edges = [0, *itertools.chain.from_iterable(self.runs), self.period]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        return Selection(self.period, tuple((start, stop) for start, stop in gaps if start < stop))


EVERYTHING = Selection(1, ((0, 1),))


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Which positions the branches of one block get: both all of them, or complements."""

    attention: Selection
    ssm: Selection

    @property
    def is_split(self) -> bool:
        """False where both branches see every position (no_split)."""
        return self.attention != self.ssm


SHARED = BlockPlan(EVERYTHING, EVERYTHING)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The split of a sequence of `length` positions, block by block."""

    length: int
    blocks: tuple[BlockPlan, ...]

    @property
    def is_partitioned(self) -> bool:
        """True where all blocks cut the positions into the same two sets.

        Then no token ever meets one of the other set: two models that share a head.
        """
        cuts = {frozenset((block.attention, block.ssm)) for block in self.blocks}
        return len(cuts) == 1 and self.blocks[0].is_split


def circular_window(start: int, width: int, modulus: int) -> Selection:
    """`width` positions from `start` on, modulo `modulus`; a wrapped window is two runs."""
    start %= modulus
    stop = start + width
    if stop <= modulus:
        runs: tuple[Run, ...] = ((start, stop),)
    else:
        runs = ((0, stop - modulus), (start, modulus))
    runs = tuple(run for run in runs if run[0] < run[1])
    return Selection(modulus, runs)


def with_fixed_share(split: SplitConfig, dims: BranchDims, length: int) -> SplitConfig:
    """`split` with a balance by time replaced by the share that it comes to now and here.

    A model is trained and used with one plan, whatever is measured later or elsewhere.
    """
    if split.balance != "time":
        return split
    share = min(max(attention_tokens(split, dims, length), 1), length - 1) / length
    if share == 0.5:  # a half that is asked for is kept, even where fac_split only swaps halves
        share = 0.5 - 0.25 / length
    return dataclasses.replace(split, balance=share)


def attention_tokens(split: SplitConfig, dims: BranchDims, length: int) -> int:
    """Attention's share of `length` positions before alignment, in tokens, by `split.balance`.

    'time' is the balance by what was measured on the device that is compiled for; where nothing
    was, a logged line says so and it is that of 'flops'.
    """
    if split.balance == "time":
        kind = target_device_kind()
        if times := measured.load(kind, dims):
            return times.balanced_tokens(length)
        _warn_unmeasured(kind)
    if split.balance in ("flops", "time"):
        return balanced_tokens(dims, length)
    share = 0.5 if split.balance == "equal" else split.balance
    return round(share * length)


@functools.cache
def _warn_unmeasured(kind: str) -> None:
    _log.warning(
        "split.balance 'time': the branches were not measured on %s; run `python -m "
        "flowhn_jax.bench branches` with this config there. Balanced by FLOPs",
        kind,
    )


def _aligned(split: SplitConfig, tokens: int, length: int) -> int:
    """`tokens` to the nearest multiple of `split.align` that leaves both branches some work.

    fac_split must not come to N/2 by rounding, where its window would only swap the halves: there
    the next nearest is taken. A length too short for a multiple is not aligned.
    """
    asked_for_half = split.balance in ("equal", 0.5)
    swaps = set() if split.strategy != "fac_split" or asked_for_half else {length / 2}
    align = 1 if split.balance == "equal" else split.align
    for step in (align, 1):
        multiples = set(range(step, length, step)) - swaps
        if multiples:
            return min(multiples, key=lambda multiple: (abs(multiple - tokens), multiple))
    return tokens


def _interleaved(split: SplitConfig, tokens: int, length: int, block: int) -> Selection:
    period = split.period
    run = min(max(round(tokens / length * period), 1), period - 1)
    shift = max(1, run // 2) if split.shift is None else split.shift
    return circular_window(period - run - block * shift, run, period)


def _attention_selection(
    split: SplitConfig, dims: BranchDims, length: int, block: int
) -> Selection:
    """What attention gets in block `block`, counted from the first behind the stem."""
    match split.strategy:
        case "ae_split" | "alternating_reference":
            half, even = length // 2, block % 2 == 0
            if even and split.strategy == "alternating_reference":
                half = length - half
            start, width = (half, length - half) if even else (0, half)
            return circular_window(start, width, length)
        case "fa_split_reference":
            return circular_window(0, math.floor(_REFERENCE_ATTENTION_SHARE * length), length)
    tokens = attention_tokens(split, dims, length)
    if split.strategy == "fai_split":
        return _interleaved(split, tokens, length, block)
    tokens = _aligned(split, tokens, length)
    steps = 1 if split.strategy == "fa_split" else block + 1
    return circular_window(length - steps * tokens, tokens, length)


@functools.lru_cache(maxsize=256)
def make_plan(
    split: SplitConfig,
    dims: BranchDims,
    *,
    blocks: int,
    context: int,
    length: int | None = None,
) -> Plan:
    """Plans the split of a sequence.

    Args:
      split: the user's choice.
      dims: sizes of the branches, for the FLOP balance.
      blocks: number of blocks, stem included.
      context: N, the length that the model is made for.
      length: positions present; None means `context`. With scope 'context' the plan of N is
        restricted to them, with scope 'sequence' a plan of N = `length` is made.

    Raises:
      ValueError: `length` exceeds the context of a strategy that is tied to it.
    """
    length = context if length is None else length
    if length < 1:
        raise ValueError(f"The sequence has {length} positions; accepted is 1 or more.")
    if split.scope == "sequence":
        context = length
    elif length > context and is_bounded(split, blocks):
        raise ValueError(
            f"The sequence has {length} positions, but {split.strategy} was planned for a context "
            f"of {context}; accepted is 1 to {context} (fai_split and no_split take any length)."
        )
    block_plans = []
    for block in range(blocks):
        if split.strategy == "no_split" or block < split.stem:
            block_plans.append(SHARED)
        else:
            attention = _attention_selection(split, dims, context, block - split.stem)
            block_plans.append(BlockPlan(attention, attention.complement()))
    return Plan(length, tuple(block_plans))


def is_bounded(split: SplitConfig, blocks: int) -> bool:
    """Whether no position behind the context has a branch."""
    return split.strategy not in ("no_split", "fai_split") and split.stem < blocks


def partition_warning(split: SplitConfig, plan: Plan) -> str | None:
    """What to tell a user whose plan is two language models that never meet; None if it is not."""
    if not plan.is_partitioned:
        return None
    return (
        f"{split.strategy} cuts the positions into the same two sets in every block: nothing "
        "crosses between them. split.stem=1 lets it cross, and so do fac_split and fai_split with "
        "two blocks or more, a share of attention that is not one half, and their own shift."
    )
