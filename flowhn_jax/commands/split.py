"""`flowhn split`: which tokens each block sends to which branch, as a table and as a picture."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags, define_config
from flowhn_jax.report.table import text_table
from flowhn_jax.utils.text import short_repr

if TYPE_CHECKING:
    from flowhn_jax.config import FlowHNConfig, ModelConfig
    from flowhn_jax.split import AnyBlockPlan, SplitConfig


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that prints the plan of a config."""
    parse_config = define_config(flags)
    lengths = flags.listing(
        "lengths",
        [],
        "context lengths to plan for, separated by commas; prints one line per length instead of "
        "one per block.",
    )
    plot = flags.path("plot", "picture of the plan to write: .png, .svg or .pdf.")
    return lambda: _print_plan(parse_config().model, lengths.value, plot.value)


def _print_plan(model: "ModelConfig", lengths: Sequence[str], plot: str | None) -> None:
    import jax

    from flowhn_jax import models
    from flowhn_jax.config import require_flowhn
    from flowhn_jax.report.plots import plot_split
    from flowhn_jax.split import reach
    from flowhn_jax.split.plan import partition_warning

    config = require_flowhn(model, "flowhn split")
    split = config.split
    if split.balance != "time":  # without a measured balance, planning needs no accelerator
        jax.config.update("jax_platforms", "cpu")
    try:
        contexts = [int(length) for length in lengths]
    except ValueError:
        raise ValueError(
            "--lengths must be whole numbers separated by commas, e.g. 1024,8192; got "
            f"{short_repr(','.join(lengths))}."
        ) from None
    planned = lengths_table(config, contexts) if contexts else table(config)
    print(f"{models.param_count(config):,} parameters")
    print(
        f"{split.strategy}, context {config.context:,}, balance {split.balance}, "
        f"{config.blocks} blocks, stem {_stem(split)}"
        f"{', both branches read all tokens' if split.reads == 'all' else ''}\n"
    )
    print(planned)
    plan = config.plan()
    share = reach(plan)
    reached = "can reach logit i, depending on the text" if plan.is_learned else "reaches logit i"
    print(f"\nreach {share:.4f}: share of pairs (i, j <= i) in which token j {reached}")
    if warning := partition_warning(split, plan):
        print(f"warning: {warning}")
    if plot:
        plot_split(plan, f"{split.strategy}: {config.context:,} tokens, reach {share:.3f}", plot)
        print(f"wrote {plot}")


def imbalance(attention: int, ssm: int) -> float:
    """Return by how many per cent the smaller of two amounts of work falls short of the larger."""
    return 100 * abs(attention - ssm) / max(attention, ssm)


def branch_flops(
    config: "FlowHNConfig", attention: int, ssm: int, read: int | None
) -> tuple[int, int]:
    """Return the forward FLOPs of both branches for the number of tokens that each gets.

    If `read` is not None, both branches read that many.
    """
    from flowhn_jax.split import attention_branch_flops, ssm_branch_flops

    of_attention = attention_branch_flops(config.dims, attention, read=read)
    return of_attention, ssm_branch_flops(config.dims, ssm, read=read)


def table(config: "FlowHNConfig") -> str:
    """Return the tokens and FLOPs of both branches in every block, as a table."""
    context = config.context
    plan = config.plan()
    period = plan.blocks[-1].attention.period
    modulo = "" if period in (1, context) or plan.is_learned else f" modulo {period}"
    rows = []
    for index, block in enumerate(plan.blocks):
        tokens = block.attention.count(context), block.ssm.count(context)
        flops = branch_flops(config, *tokens, read=context if block.reads_all else None)
        rows.append(
            [
                str(index),
                *(f"{count:,}" for count in tokens),
                *(f"{count / 1e6:,.1f}" for count in flops),
                f"{imbalance(*flops):.2f}",
                _positions(block, context),
            ]
        )
    headings = [
        "block",
        "attention\ntokens",
        "SSM\ntokens",
        "attention\nMFLOPs",
        "SSM\nMFLOPs",
        "imbalance\n%",
        f"attention's positions{modulo}",
    ]
    return text_table(headings, rows, left=(6,))


def _stem(split: "SplitConfig") -> str:
    """Return the number of the stem's blocks, and their kind unless both branches see all."""
    return f"{split.stem} ({split.stem_kind})" if split.stem_kind != "no_split" else f"{split.stem}"


def _positions(block: "AnyBlockPlan", context: int) -> str:
    """Return attention's positions as runs, such as "0-447 896-1023", or a learned number."""
    from flowhn_jax.split import LearnedBlockPlan

    if isinstance(block, LearnedBlockPlan):
        return f"{block.attention.width} of every {block.attention.period}, by score"
    if not block.is_split or 1 < context == block.attention.count(context):
        return "all"
    runs = " ".join(f"{start}-{stop - 1}" for start, stop in block.attention.runs)
    return runs if runs else "none"


def lengths_table(config: "FlowHNConfig", lengths: Sequence[int]) -> str:
    """Return the balance and the reach for several context lengths, as a table.

    The exact columns are before rounding, the planned ones of the last block. Strategies that use
    no balance (no_split, ae_split) have nothing to round.
    """
    from flowhn_jax.split import reach
    from flowhn_jax.split.plan import attention_tokens

    rows = []
    for length in lengths:
        longer = dataclasses.replace(config, context=length)
        plan = longer.plan()
        block = plan.blocks[-1]
        exact = ["-", "-"]
        if longer.split.strategy_class.uses_balance:
            tokens = attention_tokens(longer.split, longer.dims, length)
            exact = _share(longer, block, tokens, length - tokens)
        planned = _share(longer, block, block.attention.count(length), block.ssm.count(length))
        rows.append([f"{length:,}", *exact, *planned, f"{reach(plan):.4f}"])
    headings = ["context", *(f"{each}\n{when}" for when in ("exact", "planned")
                             for each in ("attention", "imbalance %")), "reach"]  # fmt: skip
    return text_table(headings, rows, left=())


def _share(config: "FlowHNConfig", block: "AnyBlockPlan", attention: int, ssm: int) -> list[str]:
    """Return attention's tokens and the imbalance, as cells."""
    read = config.context if block.reads_all else None
    return [f"{attention:,}", f"{imbalance(*branch_flops(config, attention, ssm, read)):.3f}"]


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and print the plan."""
    with runner.command("split", define, argv) as main:
        main()
