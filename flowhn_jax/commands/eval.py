"""Evaluate and use a model: `flowhn eval`, or python eval.py --workdir=runs/tiny --mode=MODE."""

from collections.abc import Callable, Sequence

import absl.flags

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags, define_optional_config, define_processes

_MODES = ["perplexity", "throughput", "tasks", "recall", "generate"]


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that runs the mode they name."""
    values = flags.values
    mode = absl.flags.DEFINE_enum(
        "mode", None, _MODES, "what to do.", required=True, flag_values=values
    )
    parse_config = define_optional_config(flags)
    workdir = flags.define_path("workdir", "folder of the trained run.")
    checkpoint = absl.flags.DEFINE_string(
        "checkpoint",
        None,
        "latest (default), best (by validation loss), or the number of a step.",
        flag_values=values,
    )
    join_processes = define_processes(flags)
    options = _define_options(flags)

    def main() -> None:
        from flowhn_jax.bench import throughput
        from flowhn_jax.evaluation.evaluate import evaluate

        join_processes()
        evaluate(
            parse_config(),
            workdir.value,
            mode.value,
            checkpoint.value,
            benchmarks={"throughput": throughput.measure},
            **{each.name: each.value for each in options if each.value is not None},
        )

    return main


def _define_options(flags: Flags) -> list[absl.flags.FlagHolder]:
    """Define the flags of single modes, which get those that are given, by their names."""
    values = flags.values
    string, integer = absl.flags.DEFINE_string, absl.flags.DEFINE_integer
    number, boolean = absl.flags.DEFINE_float, absl.flags.DEFINE_bool
    found = []
    with flags.group("--mode=perplexity"):
        found += [
            flags.define_path(
                "data",
                "text file, or folder of a prepared set; default: the run's validation set.",
            ),
            integer(
                "stride",
                None,
                "of a text: tokens between the starts of windows; default: the context.",
                flag_values=values,
            ),
            integer(
                "context",
                None,
                "of a text: tokens of a window; default: the model's context.",
                flag_values=values,
            ),
            boolean(
                "by_position",
                None,
                "write the loss by the number of preceding tokens, as CSV and as a picture.",
                flag_values=values,
            ),
        ]
    with flags.group("--mode=perplexity, tasks and generate"):
        found.append(
            absl.flags.DEFINE_enum(
                "first_token",
                None,
                ["auto", "bos", "eot", "none"],
                "what each text begins with; default: as in the run's training data.",
                flag_values=values,
            )
        )
    with flags.group("--mode=throughput"):
        found.append(
            integer(
                "repeats", None, "timed repeats; default: 10.", lower_bound=1, flag_values=values
            )
        )
    with flags.group("--mode=tasks"):
        found += [
            string("tasks", None, "names of tasks, separated by commas.", flag_values=values),
            flags.define_path("task_dir", "folder with the tasks' files, JSONL or parquet."),
        ]
    with flags.group("--mode=recall"):
        found += [
            string(
                "lengths",
                None,
                "lengths in tokens, separated by commas; default: up to the context.",
                flag_values=values,
            ),
            integer(
                "items",
                None,
                "questions per task and length; default: 100.",
                flag_values=values,
            ),
        ]
    with flags.group("--mode=generate"):
        found += [
            string("prompt", None, "text to continue.", flag_values=values),
            flags.define_path(
                "prompts",
                "file of prompts, one per line, or .jsonl with a `prompt` in each record.",
            ),
            integer(
                "max_new_tokens",
                None,
                "most new tokens per prompt; default: 128.",
                flag_values=values,
            ),
            number(
                "temperature",
                None,
                "softmax temperature; 0 always takes the most likely token; default: 1.",
                flag_values=values,
            ),
            integer("top_k", None, "sample from the k most likely tokens.", flag_values=values),
            number(
                "top_p",
                None,
                "sample from the most likely tokens that together have this probability.",
                flag_values=values,
            ),
            number(
                "min_p",
                None,
                "sample from tokens at least this fraction as likely as the most likely one.",
                flag_values=values,
            ),
            number(
                "repetition_penalty",
                None,
                "above 1: make tokens less likely that the text already has.",
                flag_values=values,
            ),
            absl.flags.DEFINE_multi_string(
                "stop",
                None,
                "end the text before this string.",
                flag_values=values,
            ),
            integer("batch_size", None, "prompts per batch; default: 16.", flag_values=values),
            boolean(
                "replan",
                None,
                "continue beyond the context that the split is planned for, in a new window.",
                flag_values=values,
            ),
        ]
    with flags.group("--mode=recall and generate"):
        found.append(
            integer(
                "seed",
                None,
                "seed of the random numbers; default: 0.",
                lower_bound=0,
                upper_bound=2**32 - 1,
                flag_values=values,
            )
        )
    return found


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and run the mode."""
    runner.run("eval", define, argv)
