"""Reach: how much of the past can influence each position, computed from the plan alone.

In one block an output depends on itself and on the earlier positions that one of its branches
reads. Positions whose branches agree in every block form a class, which repeats with the plan's
period. If a source reaches a position of a class, it reaches all later ones of that class as well,
so it is enough to follow the first reachable position of every class through the blocks.

Where the text decides which positions a branch gets, a token can influence all later ones: for each
pair there is a text that sends both to one branch. The plan does not determine which pairs a given
text connects.
"""

import math

import numpy as np

from flowhn_jax.split.plan import AnyBlockPlan, BlockPlan, LearnedBlockPlan, Plan
from flowhn_jax.split.selection import EVERYTHING, Selection


def _reads(block: AnyBlockPlan) -> tuple[Selection, ...]:
    """Return the sets of positions within which a block can pass information on."""
    return (EVERYTHING,) if isinstance(block, LearnedBlockPlan) else block.reads


def _classes(plan: Plan, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Return starts [C] and stops [C] of the parts of a period within which no branch changes."""
    edges = {0, period}
    for block in plan.blocks:
        if isinstance(block, LearnedBlockPlan):
            continue
        for selection in (block.attention, block.ssm):
            if selection.width == selection.period:  # all positions: no edges
                continue
            for offset in range(0, period, selection.period):
                edges.update(min(offset + edge, period) for run in selection.runs for edge in run)
    ordered = np.array(sorted(edges))
    return ordered[:-1], ordered[1:]


def _next_position(position: np.ndarray, start: np.ndarray, stop: np.ndarray, period: int):
    """Return the first position at or after `position` in the class [start, stop) mod `period`."""
    base = position - position % period
    offset = position % period
    return np.where(
        offset < start,
        base + start,
        np.where(offset < stop, position, base + period + start),
    )


def reach(plan: Plan) -> float:
    """Return the share of pairs (i, j <= i) in which token j can influence logit i."""
    length = plan.length
    positional = (block for block in plan.blocks if isinstance(block, BlockPlan))
    period = min(math.lcm(*(block.attention.period for block in positional)), length)
    starts, stops = _classes(plan, period)
    sources = np.arange(period)
    never = np.iinfo(np.int64).max // 4

    # first[j, c]: the first position of class c that source j reaches after the blocks so far.
    first = np.full((period, len(starts)), never)
    own = np.searchsorted(stops, sources, side="right")
    first[sources, own] = sources
    for block in plan.blocks:
        reached = first.copy()
        for selection in _reads(block):
            members = np.array([selection.contains(int(start)) for start in starts])
            if not members.any():
                continue
            earliest = first[:, members].min(axis=1)
            candidate = _next_position(earliest[:, None], starts, stops, period)
            candidate = np.where(members & (earliest < never)[:, None], candidate, never)
            reached = np.minimum(reached, candidate)
        first = reached

    def below(position: np.ndarray) -> np.ndarray:
        """Return the number of members of each class below `position` [..., C]."""
        whole, offset = np.divmod(position, period)
        return whole * (stops - starts) + np.clip(offset - starts, 0, stops - starts)

    pairs = 0
    in_length = below(np.array(length))
    for shift in range(0, length, period):
        position = np.minimum(first + shift, length)[: length - shift]
        pairs += int((in_length - below(position)).sum())
    return pairs / (length * (length + 1) // 2)
