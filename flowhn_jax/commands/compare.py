"""`flowhn compare`: FlowHN and its baselines, measured on this machine in the same way."""

from collections.abc import Callable, Sequence

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that measures and draws the comparison."""
    from flowhn_jax.compare.model_configs import NAMES, SIZES, model_configs, parse_names

    size = flags.string("size", None, f"size of the models: {', '.join(SIZES)}.", required=True)
    names = flags.string(
        "models", "all", f"all, or some of these, separated by commas: {', '.join(NAMES)}."
    )
    train_tokens = flags.integer(
        "train_tokens",
        0,
        "tokens that each model is trained on; 0 measures speed alone.",
        minimum=0,
    )
    workdir = flags.string(
        "workdir",
        None,
        "folder of the comparison, which continues there; default: runs/compare_SIZE.",
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
        from flowhn_jax.compare.comparison import compare

        configs = model_configs(
            size.value,
            parse_names(names.value),
            train_tokens.value,
            context.value,
            batch_size.value,
        )
        compare(
            configs,
            size.value,
            workdir.value or f"runs/compare_{size.value}",
            trains=train_tokens.value > 0,
            rounds=rounds.value,
            repeats=repeats.value,
            report_only=report_only.value,
        )

    return main


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and compare the models."""
    runner.run("compare", define, argv)
