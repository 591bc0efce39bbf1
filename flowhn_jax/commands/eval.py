"""Evaluate and use a model: `flowhn eval`, or python eval.py --workdir=runs/tiny --mode=MODE."""

from collections.abc import Callable, Sequence

from absl.flags import FlagHolder

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags, define_ema, define_optional_config, define_processes
from flowhn_jax.utils import cpu

_MODES = ["perplexity", "throughput", "tasks", "recall", "generate"]


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that runs the mode they name."""
    mode = flags.choice("mode", None, _MODES, "what to do.", required=True)
    parse_config = define_optional_config(flags)
    workdir = flags.path("workdir", "folder of the trained run.")
    checkpoint = flags.string(
        "checkpoint", None, "latest (default), best (by validation loss), or the number of a step."
    )
    ema = define_ema(flags)
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
            ema.value,
            benchmarks={"throughput": throughput.measure},
            **{each.name: each.value for each in options if each.value is not None},
        )

    return main


def _define_options(flags: Flags) -> list[FlagHolder]:
    """Define the flags of single modes, which get by name those that are given."""
    found = []
    with flags.group("--mode=perplexity"):
        found += [
            flags.path(
                "data", "text file, or folder of a prepared set; default: the run's validation set."
            ),
            flags.integer(
                "stride",
                None,
                "of a text: tokens between the starts of windows; default: the context.",
            ),
            flags.integer(
                "context", None, "of a text: tokens of a window; default: the model's context."
            ),
            flags.boolean(
                "by_position",
                None,
                "write the loss by the number of preceding tokens, as CSV and as a picture.",
            ),
        ]
    with flags.group("--mode=perplexity, tasks and generate"):
        found.append(
            flags.choice(
                "first_token",
                None,
                ["auto", "bos", "eot", "none"],
                "what each text begins with; default: as in the run's training data.",
            )
        )
    with flags.group("--mode=throughput"):
        found.append(flags.integer("repeats", None, "timed repeats; default: 10.", minimum=1))
    with flags.group("--mode=tasks"):
        found += [
            flags.string("tasks", None, "names of tasks, separated by commas."),
            flags.path("task_dir", "folder with the tasks' files, JSONL or parquet."),
        ]
    with flags.group("--mode=recall"):
        found += [
            flags.string(
                "lengths",
                None,
                "lengths in tokens, separated by commas; default: up to the context.",
            ),
            flags.integer("items", None, "questions per task and length; default: 100."),
        ]
    with flags.group("--mode=generate"):
        found += [
            flags.string("prompt", None, "text to continue."),
            flags.path(
                "prompts",
                "file of prompts, one per line, or .jsonl with a `prompt` in each record.",
            ),
            flags.integer("max_new_tokens", None, "most new tokens per prompt; default: 128."),
            flags.number(
                "temperature",
                None,
                "softmax temperature; 0 always takes the most likely token; default: 1.",
            ),
            flags.integer("top_k", None, "sample from the k most likely tokens."),
            flags.number(
                "top_p",
                None,
                "sample from the most likely tokens that together have this probability.",
            ),
            flags.number(
                "min_p",
                None,
                "sample from tokens at least this fraction as likely as the most likely one.",
            ),
            flags.number(
                "repetition_penalty",
                None,
                "above 1: make tokens that the text already contains less likely.",
            ),
            flags.strings("stop", None, "end the text before this string."),
            flags.integer("batch_size", None, "prompts per batch; default: 16."),
            flags.boolean(
                "replan",
                None,
                "continue beyond the context that the split is planned for, in a new window.",
            ),
        ]
    with flags.group("--mode=recall and generate"):
        found.append(
            flags.integer(
                "seed",
                None,
                "seed of the random numbers; default: 0.",
                minimum=0,
                maximum=2**32 - 1,
            )
        )
    return found


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and run the mode."""
    cpu.prepare_memory()
    with runner.command("eval", define, argv) as main:
        main()
