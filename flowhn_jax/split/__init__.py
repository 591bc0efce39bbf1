"""The split: which token positions go to attention and which to the SSM, in every block.

A split is a pure function of static facts (lengths, model dimensions, strategy), computed in
plain Python during tracing, so that every array shape is static and nothing is routed at run time.
Only `learned_split` chooses positions from the text, and even then their number is static
(`split.routing`).
"""

from flowhn_jax.split.apply import contains, count, merge, take
from flowhn_jax.split.config import SplitConfig
from flowhn_jax.split.cost import BranchDims, attention_branch_flops, ssm_branch_flops
from flowhn_jax.split.plan import (
    AnyBlockPlan,
    BlockPlan,
    LearnedBlockPlan,
    Plan,
    is_bounded,
    make_plan,
)
from flowhn_jax.split.reach import reach
from flowhn_jax.split.selection import Quota, Selection
from flowhn_jax.split.strategies import (
    PARITY_STRATEGIES,
    STRATEGIES,
    Strategy,
    get_strategy,
    register,
)

__all__ = [
    "PARITY_STRATEGIES",
    "STRATEGIES",
    "AnyBlockPlan",
    "BlockPlan",
    "BranchDims",
    "LearnedBlockPlan",
    "Plan",
    "Quota",
    "Selection",
    "SplitConfig",
    "Strategy",
    "attention_branch_flops",
    "contains",
    "count",
    "get_strategy",
    "is_bounded",
    "make_plan",
    "merge",
    "reach",
    "register",
    "ssm_branch_flops",
    "take",
]
