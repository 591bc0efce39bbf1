"""`flowhn compare`: FlowHN and its baselines, measured on this machine in the same way."""

from collections.abc import Callable, Sequence

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags
from flowhn_jax.utils import cpu


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that measures and draws the comparison."""
    from flowhn_jax.compare.budget import parse_budget
    from flowhn_jax.compare.model_configs import (
        MATCHES,
        NAMES,
        SIZES,
        model_configs,
        parse_names,
    )
    from flowhn_jax.compare.run_grid import parse_rates
    from flowhn_jax.compare.training_data import CORPORA

    size = flags.string("size", None, f"size of the models: {', '.join(SIZES)}.", required=True)
    names = flags.string(
        "models", "all", f"all, or some of these, separated by commas: {', '.join(NAMES)}."
    )
    match = flags.choice(
        "match",
        MATCHES[0],
        MATCHES,
        "what the baselines' sizes are chosen by: params, as many parameters as FlowHN's no_split; "
        "or flops, as many FLOPs per token as its fac_split.",
    )
    workdir = flags.path(
        "workdir",
        "folder of the comparison, which continues there; default: runs/compare_SIZE.",
    )
    with flags.group("training"):
        budget = flags.string(
            "budget",
            None,
            "what each model is trained for: tokens:N, flops:N (of training) or seconds:N (of "
            "train steps, at the speed that was measured before), e.g. tokens:2e6; default: "
            "nothing is trained.",
        )
        seeds = flags.integer(
            "seeds", 1, "seeds that each model is trained with, from 0.", minimum=1, maximum=1000
        )
        corpus = flags.choice(
            "corpus",
            CORPORA[0],
            CORPORA,
            "embedded, Python's own sources as bytes; or packages, up to 128 MiB of the sources of "
            "installed packages, with a tokenizer that is trained on them.",
        )
        recall = flags.number(
            "recall",
            0.0,
            "share of the training windows with texts of the recall tasks, on which the models are "
            "then scored, e.g. 0.1.",
            minimum=0,
            maximum=0.9,
        )
        rates = flags.listing(
            "rates",
            [],
            "learning rates that each model is trained with, separated by commas; its results are "
            "those of its best one. Default: the recipe's.",
        )
    rounds = flags.integer(
        "rounds",
        5,
        "rounds of timing, each of which times every model once.",
        minimum=1,
        maximum=1000,
    )
    repeats = flags.integer(
        "repeats", 5, "timed calls per model and round.", minimum=1, maximum=10_000
    )
    context = flags.integer("context", None, "context length; default: the recipes'.")
    batch_size = flags.integer("batch_size", None, "sequences per step; default: the recipes'.")
    report_only = flags.boolean("report_only", False, "draw the report again without measuring.")

    def main() -> None:
        from flowhn_jax.compare.comparison import Training, compare

        training = Training(
            None if budget.value is None else parse_budget(budget.value),
            seeds.value,
            parse_rates(rates.value),
            corpus.value,
            recall.value,
        )
        configs = model_configs(
            size.value,
            parse_names(names.value),
            context.value,
            batch_size.value,
            match.value,
        )
        compare(
            configs,
            size.value,
            workdir.value or f"runs/compare_{size.value}",
            training,
            rounds=rounds.value,
            repeats=repeats.value,
            report_only=report_only.value,
        )

    return main


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and compare the models."""
    cpu.prepare_memory()
    with runner.command("compare", define, argv) as main:
        main()
