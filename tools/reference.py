"""Write docs/reference.md: `python tools/reference.py`; with --check, only compare.

The flags come from the commands, the config keys from the dataclasses of `flowhn_jax.config`.
"""

import argparse
import importlib
import pathlib
import sys
from collections.abc import Iterable, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flowhn_jax.commands import help_text  # noqa: E402
from flowhn_jax.commands.flags import Flags  # noqa: E402
from flowhn_jax.commands.main import COMMANDS  # noqa: E402

PAGE = ROOT / "docs" / "reference.md"

WORKDIR = [
    ("config.json", "the config of the run; `flowhn eval --workdir=...` reads it"),
    ("commands.txt", "the command lines that trained the run; a model card shows them"),
    (
        "metrics.jsonl",
        "one JSON object per logged step, see [below](#rows-of-metricsjsonl); in a bucket those "
        "after 10 MB are in `metrics-00001.jsonl` and so on",
    ),
    (
        "tensorboard/",
        "the same rows for TensorBoard: `tensorboard --logdir=WORKDIR`; in `plugins/profile/` the "
        "profile of `train.profile`",
    ),
    (
        "wandb.json, trackio.json, wandb/",
        "the run's id in a tracker of `train.writers`, and what `wandb` writes locally",
    ),
    ("loss.png", "training and validation loss over the steps, drawn at the end of a run"),
    ("sample.json", "a text that the model generated after the last step, with its prompt"),
    (
        "checkpoints/STEP/",
        "parameters, optimizer state and position in the data, with a manifest of hashes",
    ),
    (
        "checkpointed.json",
        "records that the run has had a checkpoint, so that the loss of all of them is noticed",
    ),
    ("damaged/", "checkpoints that were found damaged or incomplete, moved out of the way"),
    ("data/", "the prepared embedded corpus, if `data.path` is not set"),
    ("lock", "which process is using the workdir, or used it last; in a bucket, the lock itself"),
    ("debug/", "a workdir that repeats the skipped steps, written before a run gives up"),
    ("tokenizer.json, tokenizer_config.json, ...", "the tokenizer of an imported model"),
    ("by_position.csv, by_position.png", "of `flowhn eval --mode=perplexity --by_position`"),
]

METRICS = [
    (
        "step",
        "steps done; there is a row every `train.log_every` steps and at each validation",
    ),
    ("loss", "of that step, nats per token, including `train.z_loss` if there is any"),
    ("grad_norm", "global norm of that step's gradient, before clipping"),
    ("learning_rate", "of that step"),
    (
        "skipped",
        "steps so far that changed nothing because their loss or gradient was not finite",
    ),
    ("spikes", "jumps of the loss so far"),
    ("tokens", "tokens trained on so far"),
    ("time", "seconds since 1970"),
    (
        "step_seconds",
        "per step since the row or checkpoint before, until the device is done; without compiling, "
        "validating and saving",
    ),
    ("tokens_per_second", "over the same steps"),
    ("tokens_per_second_per_device", "over the same steps"),
    (
        "tflops_per_second_per_device",
        "model FLOPs over the same steps; attention scores count half, since they are causal",
    ),
    (
        "mfu",
        "these FLOPs as a fraction of the device's peak in bfloat16; null if the peak is not known",
    ),
    ("mfu_palm", "mfu with all T² attention scores, as in PaLM"),
    (
        "data_wait",
        "seconds per step that the run waited for data, over the steps since the row before",
    ),
    (
        "checkpoint_seconds",
        "seconds since the row before in which training waited for checkpoints; most of their "
        "writing is in the background",
    ),
    (
        "goodput",
        "share of the wall time since the start or resume that was spent in steps: not in opening, "
        "compiling, waiting for data, validating or waiting for checkpoints",
    ),
    (
        "validation_loss",
        "nats per token, every `train.eval_every` steps and at the end; absent in other rows",
    ),
    ("validation_bits_per_byte", "the same loss in bits per byte of text"),
]

OPTIONAL_METRICS = [
    (
        "validation_ema_loss, validation_ema_bits_per_byte",
        "of the average of the parameters, with `train.ema`",
    ),
    (
        "validation_loss/NAME",
        "of each set of a mixture and of `data.validation`; `validation_loss` is then the mean "
        "over the mixture by its weights, or the loss on the one set in `data.path`",
    ),
    ("validation_bits_per_byte/NAME", "the loss on the set in bits per byte"),
    ("epochs/NAME", "how often the run has gone through a set of a mixture so far"),
]


def page() -> str:
    """Return the whole page, in Markdown."""
    return "\n".join(
        [
            "# Reference",
            "",
            "Written by `python tools/reference.py`; a test compares it with the code.",
            "",
            "- [Commands and their flags](#commands-and-their-flags)",
            "- [Config keys](#config-keys)",
            "- [Files of a workdir](#files-of-a-workdir)",
            "- [Rows of metrics.jsonl](#rows-of-metricsjsonl)",
            "",
            *_commands(),
            *_config(),
            "## Files of a workdir",
            "",
            *_table(("file", "what it holds"), [(f"`{a}`", b) for a, b in WORKDIR]),
            "",
            "## Rows of metrics.jsonl",
            "",
            *_table(("key", "meaning"), [(f"`{a}`", b) for a, b in METRICS]),
            "",
            "With several sets, or an average of the parameters, there are also:",
            "",
            *_table(("key", "meaning"), [(f"`{a}`", b) for a, b in OPTIONAL_METRICS]),
            "",
        ]
    )


def _commands() -> Iterable[str]:
    """Yield the lines about all commands."""
    yield from (
        "## Commands and their flags",
        "",
        "`python -m flowhn_jax COMMAND` is the same as `flowhn COMMAND`, without installation; "
        "`python train.py` and `python eval.py` are `flowhn train` and `flowhn eval`. A command "
        "with `--config` also takes `--config.KEY=VALUE` for every [key](#config-keys).",
        "",
    )
    for name, command in COMMANDS.items():
        flags = Flags()
        importlib.import_module(f"flowhn_jax.commands.{command.module}").define(flags)
        yield from (f"### flowhn {name}", "", command.summary, "")
        yield from ("```", f"flowhn {name} {command.example}", "```", "")
        for heading, rows in help_text.flag_rows(flags).items():
            if heading != "flags":
                yield from (f"**{heading}**", "")
            yield from _table(("flag", "meaning", "default"), _cells(rows))
            yield ""


def _config() -> Iterable[str]:
    """Yield the lines about all config keys."""
    yield from (
        "## Config keys",
        "",
        "Defaults are those without a recipe. A recipe of `configs/` sets some of them; "
        "`--config.KEY=VALUE` sets any.",
        "",
    )
    for group, rows in help_text.config_rows().items():
        yield from (f"### {group}", "")
        cells = [(spelling.removeprefix("--config."), *others) for spelling, *others in rows]
        yield from _table(("key", "meaning", "default"), _cells(cells))
        yield ""


def _cells(rows: Iterable[Sequence[str]]) -> list[tuple[str, str, str]]:
    """Return rows of the help as cells of a table."""
    return [
        (f"`{spelling}`", text, f"`{default}`" if default not in ("", "required") else default)
        for spelling, text, default in rows
    ]


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(headings), line("---" for _ in headings), *map(line, rows)]


def main() -> None:
    """Write the page, or with --check exit with status 1 if it is not up to date."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only compare the page with the code")
    is_check = parser.parse_args().check
    text = page()
    if not is_check:
        PAGE.write_text(text)
        print(f"wrote {PAGE.relative_to(ROOT)}")
    elif not PAGE.is_file() or PAGE.read_text() != text:
        sys.exit("error: docs/reference.md is not up to date; type python tools/reference.py")


if __name__ == "__main__":
    main()
