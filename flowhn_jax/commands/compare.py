"""`flowhn compare`: FlowHN and its baselines, measured on this machine in the same way."""

from collections.abc import Callable, Sequence

import absl.flags

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that measures and draws the comparison."""
    from flowhn_jax.compare.model_configs import NAMES, SIZES, model_configs, parse_names

    values = flags.values
    size = absl.flags.DEFINE_string(
        "size",
        None,
        f"size of the models: {', '.join(SIZES)}.",
        required=True,
        flag_values=values,
    )
    names = absl.flags.DEFINE_string(
        "models",
        "all",
        f"all, or some of these, separated by commas: {', '.join(NAMES)}.",
        flag_values=values,
    )
    train_tokens = absl.flags.DEFINE_integer(
        "train_tokens",
        0,
        "tokens that each model is trained on; 0 measures speed alone.",
        lower_bound=0,
        flag_values=values,
    )
    workdir = flags.define_path(
        "workdir",
        "folder of the comparison, which continues there; default: runs/compare_SIZE.",
    )
    rounds = absl.flags.DEFINE_integer(
        "rounds",
        5,
        "rounds of timing, each of which times every model once.",
        lower_bound=1,
        upper_bound=1000,
        flag_values=values,
    )
    repeats = absl.flags.DEFINE_integer(
        "repeats",
        5,
        "timed calls per model and round.",
        lower_bound=1,
        upper_bound=10_000,
        flag_values=values,
    )
    context = absl.flags.DEFINE_integer(
        "context", None, "context length; default: the recipes'.", flag_values=values
    )
    batch_size = absl.flags.DEFINE_integer(
        "batch_size", None, "sequences per step; default: the recipes'.", flag_values=values
    )
    report_only = absl.flags.DEFINE_bool(
        "report_only", False, "draw the report again without measuring.", flag_values=values
    )

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
