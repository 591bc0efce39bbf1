"""`python -m flowhn_jax.compare --size=tiny`: FlowHN and its baselines, measured alike."""

from absl import flags

from flowhn_jax.commands import flags as cli
from flowhn_jax.compare.model_configs import NAMES, SIZES, model_configs, parse_names

_SIZE = flags.DEFINE_string("size", None, f"One of {', '.join(SIZES)}.", required=True)
_MODELS = flags.DEFINE_string("models", "all", f"all, or with commas of {', '.join(NAMES)}.")
_TOKENS = flags.DEFINE_integer(
    "train_tokens", 0, "Tokens that each model is trained on; 0: speed alone.", lower_bound=0
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the comparison, where it goes on; runs/compare_SIZE without it."
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Turns that each model is timed in.", lower_bound=1, upper_bound=1000
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Timed calls of a turn.", lower_bound=1, upper_bound=10_000
)
_CONTEXT = flags.DEFINE_integer("context", None, "Context, the recipes' without it.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Sequences, the recipes' without it.")
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Draw the report of what is there.")


def main() -> None:
    """Compares by the flags."""
    from flowhn_jax.compare.comparison import compare

    names = parse_names(_MODELS.value)
    configs = model_configs(_SIZE.value, names, _TOKENS.value, _CONTEXT.value, _BATCH_SIZE.value)
    compare(
        configs,
        _SIZE.value,
        _WORKDIR.value or f"runs/compare_{_SIZE.value}",
        trains=_TOKENS.value > 0,
        rounds=_ROUNDS.value,
        repeats=_REPEATS.value,
        report_only=_REPORT_ONLY.value,
    )


def run() -> None:
    """Parse the flags and run the command."""
    cli.run(main)
