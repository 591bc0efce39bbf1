"""Hypothesis strategies for splits and plans."""

from hypothesis import strategies as st

from flowhn_jax.config import FlowHNConfig
from flowhn_jax.split import STRATEGIES, SplitConfig, get_strategy, make_plan
from flowhn_jax.split.config import READS, STEM_KINDS

DIMS = FlowHNConfig().dims
# Those whose plans tell the positions of each branch.
POSITIONAL = tuple(name for name, strategy in STRATEGIES.items() if not strategy.is_learned)


@st.composite
def splits(draw, strategies=POSITIONAL):
    """Draw a split of one of the strategies."""
    period = draw(st.integers(3, 20))
    strategy = draw(st.sampled_from(strategies))
    stem = draw(st.integers(0, 2))
    shares = st.floats(0.02, 0.98)
    return SplitConfig(
        strategy=strategy,
        reads=draw(st.sampled_from(READS)) if get_strategy(strategy).is_split else "own",
        balance=draw(st.one_of(st.sampled_from(["flops", "equal"]), shares)),
        align=draw(st.integers(1, 9)),
        period=period,
        shift=draw(st.one_of(st.none(), st.integers(0, period - 1))),
        stem=stem,
        stem_kind=draw(st.sampled_from(STEM_KINDS)) if stem else "no_split",
    )


@st.composite
def plans(draw, max_length=60):
    """Draw a plan of a context, of a prefix or, for unbounded strategies, of a longer text."""
    split = draw(splits())
    context = draw(st.integers(1, max_length))
    length = draw(st.integers(1, context if split.strategy_class.is_bounded else max_length))
    return make_plan(split, DIMS, blocks=draw(st.integers(1, 5)), context=context, length=length)
