"""The split: which token positions go to attention and which to the SSM, in every block.

A split is a pure function of static facts (lengths, model dimensions, strategy), computed in
plain Python while tracing, so that every array shape is static and nothing is routed at run time.
"""

from flowhn_jax.split.apply import contains, count, merge, take
from flowhn_jax.split.cost import BranchDims, attention_branch_flops, ssm_branch_flops
from flowhn_jax.split.plan import (
    PARITY_STRATEGIES,
    STRATEGIES,
    BlockPlan,
    Plan,
    Selection,
    SplitConfig,
    is_bounded,
    make_plan,
)
from flowhn_jax.split.reach import reach

__all__ = [
    "PARITY_STRATEGIES",
    "STRATEGIES",
    "BlockPlan",
    "BranchDims",
    "Plan",
    "Selection",
    "SplitConfig",
    "attention_branch_flops",
    "contains",
    "count",
    "is_bounded",
    "make_plan",
    "merge",
    "reach",
    "ssm_branch_flops",
    "take",
]
