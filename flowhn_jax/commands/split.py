"""`python -m flowhn_jax.split --config=...`: the plan as a table, and as a picture with --plot."""

import dataclasses

import jax
from absl import flags

from flowhn_jax import models
from flowhn_jax.commands import flags as cli
from flowhn_jax.config import FlowHNConfig, require_flowhn
from flowhn_jax.report import plots
from flowhn_jax.split import attention_branch_flops, reach, ssm_branch_flops
from flowhn_jax.split.plan import BlockPlan, attention_tokens, partition_warning
from flowhn_jax.utils.text import short_repr

_CONFIG = cli.define_config()
_LENGTHS = flags.DEFINE_list(
    "lengths", [], "Context lengths to plan for, one line each, instead of the config's alone."
)
_PLOT = flags.DEFINE_string("plot", None, "Picture (.png, .svg, .pdf) of the plan to write.")


def _runs(block: BlockPlan) -> str:
    """Attention's positions in words."""
    if not block.is_split:
        return "all"
    runs = " ".join(f"{start}-{stop - 1}" for start, stop in block.attention.runs)
    return runs if runs else "none"


def imbalance(attention: int, ssm: int) -> float:
    """Share of the larger branch's work by which the smaller falls short, in per cent."""
    return 100 * abs(attention - ssm) / max(attention, ssm)


def branch_flops(config: FlowHNConfig, attention: int, ssm: int) -> tuple[int, int]:
    """Forward FLOPs of both branches for so many tokens each."""
    return attention_branch_flops(config.dims, attention), ssm_branch_flops(config.dims, ssm)


def table(config: FlowHNConfig) -> str:
    """Tokens and FLOPs of both branches in every block."""
    context = config.context
    plan = config.plan()
    period = plan.blocks[-1].attention.period
    where = "positions" if period in (1, context) else f"positions modulo {period}"
    lines = [
        f"{'block':>5} {'attention':>10} {'SSM':>7} {'attention':>12} {'SSM':>12} "
        f"{'imbalance':>9}  attention's {where}",
        f"{'':>5} {'tokens':>10} {'tokens':>7} {'MFLOPs':>12} {'MFLOPs':>12} {'%':>9}",
    ]
    for index, block in enumerate(plan.blocks):
        tokens = block.attention.count(context), block.ssm.count(context)
        flops = branch_flops(config, *tokens)
        lines.append(
            f"{index:>5} {tokens[0]:>10,} {tokens[1]:>7,} {flops[0] / 1e6:>12,.1f} "
            f"{flops[1] / 1e6:>12,.1f} {imbalance(*flops):>9.2f}  {_runs(block)}"
        )
    return "\n".join(lines)


def lengths_table(config: FlowHNConfig, lengths: list[int]) -> str:
    """The balance over context lengths, before and after rounding, and the reach.

    Strategies that use no balance (no_split, ae_split) have nothing to round.
    """
    lines = [
        f"{'':>8}  {'before rounding':^24}  {'planned (last block)':^24}",
        f"{'context':>8} {'attention':>12} {'imbalance %':>12} {'attention':>12} "
        f"{'imbalance %':>12} {'reach':>8}",
    ]
    for length in lengths:
        longer = dataclasses.replace(config, context=length)
        plan = longer.plan()
        block = plan.blocks[-1]
        shares = [(block.attention.count(length), block.ssm.count(length))]
        if longer.split.strategy_class.uses_balance:
            exact = attention_tokens(longer.split, longer.dims, length)
            shares.insert(0, (exact, length - exact))
        columns = [
            f"{tokens:>12,} {imbalance(*branch_flops(longer, tokens, others)):>12.3f}"
            for tokens, others in shares
        ]
        if len(columns) == 1:
            columns.insert(0, f"{'-':>12} {'-':>12}")
        lines.append(f"{length:>8,} {' '.join(columns)} {reach(plan):>8.4f}")
    return "\n".join(lines)


def main() -> None:
    """Prints the plan of a config."""
    config = require_flowhn(cli.parse_config(_CONFIG).model, "the command split")
    if config.split.balance != "time":  # else planning needs no accelerator
        jax.config.update("jax_platforms", "cpu")
    try:
        lengths = [int(length) for length in _LENGTHS.value]
    except ValueError:
        raise ValueError(
            f"--lengths is {short_repr(','.join(_LENGTHS.value))}; accepted are whole numbers and "
            "commas."
        ) from None
    split = config.split
    planned = lengths_table(config, lengths) if lengths else table(config)
    print(f"{models.param_count(config):,} parameters")
    print(
        f"{split.strategy}, context {config.context:,}, balance {split.balance}, "
        f"{config.blocks} blocks, stem {split.stem}\n"
    )
    print(planned)
    plan = config.plan()
    share = reach(plan)
    print(f"\nreach {share:.4f}: the share of pairs (i, j <= i) in which token j reaches logit i")
    if warning := partition_warning(split, plan):
        print(f"warning: {warning}")
    if _PLOT.value:
        title = f"{split.strategy}: {config.context:,} tokens, reach {share:.3f}"
        plots.plot_split(plan, title, _PLOT.value)
        print(f"wrote {_PLOT.value}")


def run() -> None:
    """Parse the flags and run the command."""
    cli.run(main)
