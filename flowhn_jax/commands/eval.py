"""Measures and uses a model: python eval.py [--config=...] --workdir=... --mode=MODE."""

from absl import flags

from flowhn_jax.commands import flags as cli

_MODES = ["perplexity", "throughput", "tasks", "recall", "generate"]

_CONFIG = cli.define_config(required=False)
_join_processes = cli.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the trained run.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "latest, best (by validation loss) or a step; the latest without it."
)
_MODE = flags.DEFINE_enum("mode", None, _MODES, "What to do.", required=True)

# Each goes to its modes as it is named, where it is given.
_OPTIONS = [
    flags.DEFINE_string(
        "data",
        None,
        "perplexity: text file or folder of a prepared set; the run's validation set without it.",
    ),
    flags.DEFINE_integer(
        "stride", None, "perplexity of a text: tokens between windows; the context without it."
    ),
    flags.DEFINE_integer(
        "context", None, "perplexity of a text: tokens of a window; the model's without it."
    ),
    flags.DEFINE_bool(
        "by_position", None, "perplexity: the loss by tokens before, as CSV and picture."
    ),
    flags.DEFINE_enum(
        "first_token",
        None,
        ["auto", "bos", "eot", "none"],
        "perplexity, tasks, generate: what a text begins with; as the run's data without it.",
    ),
    flags.DEFINE_integer("repeats", None, "throughput: timed repeats (10).", lower_bound=1),
    flags.DEFINE_string("tasks", None, "tasks: names with commas between them."),
    flags.DEFINE_string("task_dir", None, "tasks: folder of their files, JSONL or parquet."),
    flags.DEFINE_string("lengths", None, "recall: tokens, with commas; up to the context."),
    flags.DEFINE_integer("items", None, "recall: questions of each task and length (100)."),
    flags.DEFINE_string("prompt", None, "generate: the text to continue."),
    flags.DEFINE_string("prompts", None, "generate: file of prompts, one a line, or .jsonl."),
    flags.DEFINE_integer("max_new_tokens", None, "generate: the most for each prompt (128)."),
    flags.DEFINE_float("temperature", None, "generate: 0 takes the likeliest token (1.0)."),
    flags.DEFINE_integer("top_k", None, "generate: from so many of the likeliest tokens."),
    flags.DEFINE_float("top_p", None, "generate: from the likeliest of this probability."),
    flags.DEFINE_float("min_p", None, "generate: from those of this share of the likeliest's."),
    flags.DEFINE_float("repetition_penalty", None, "generate: above 1 against repeating."),
    flags.DEFINE_multi_string("stop", None, "generate: ends the text; may be given repeatedly."),
    flags.DEFINE_integer("batch_size", None, "generate: prompts side by side (16)."),
    flags.DEFINE_bool(
        "replan", None, "generate: go on behind the split's context, in a new window."
    ),
    flags.DEFINE_integer(
        "seed",
        None,
        "generate, recall: of the random numbers (0).",
        lower_bound=0,
        upper_bound=2**32 - 1,
    ),
]


def main() -> None:
    """Runs the mode by the flags and prints its table and its JSON line."""
    from flowhn_jax.bench import throughput
    from flowhn_jax.evaluation.evaluate import evaluate

    _join_processes()
    options = {each.name: each.value for each in _OPTIONS if each.value is not None}
    config = None if _CONFIG.value is None else cli.parse_config(_CONFIG)
    evaluate(
        config,
        _WORKDIR.value,
        _MODE.value,
        _CHECKPOINT.value,
        benchmarks={"throughput": throughput.measure},
        **options,
    )


def run() -> None:
    """Parse the flags and run the mode."""
    cli.run(main)
