"""The summary of a complete run: its result, loss curve, a sample of text, and next commands."""

import contextlib
import math
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np

from flowhn_jax import models
from flowhn_jax.checkpoints.files import directory, latest_step
from flowhn_jax.checkpoints.rows import Row, elapsed_seconds, read_rows
from flowhn_jax.config import Config
from flowhn_jax.data.run_data import RunData
from flowhn_jax.evaluation.generate import generate
from flowhn_jax.evaluation.sampling import Sampling
from flowhn_jax.models import Params
from flowhn_jax.parallel.distributed import is_first
from flowhn_jax.report.plots import plot_losses
from flowhn_jax.storage import place
from flowhn_jax.training.health.preemption import StopRequest
from flowhn_jax.training.sample import Sample, write_sample
from flowhn_jax.utils.progress import activity, clock, log
from flowhn_jax.utils.text import one_line

PICTURE = "loss.png"
_SAMPLE_BYTES, _PROMPT_BYTES = 100, 32
_SAMPLING = Sampling(temperature=0.8, top_p=0.95)
_STEPS_FLAG = "--config.train.steps"


def print_summary(
    config: Config,
    params: Params,
    data: RunData,
    *,
    workdir: str,
    argv: Sequence[str],
    stop: StopRequest,
) -> None:
    """Print the summary of a complete run, and draw its losses to `loss.png` in the workdir.

    The picture and the sample are optional: an error in one of them is logged, and a signal skips
    what is left of them. All processes may call the function; the first one prints.

    Args:
      config: the config of the run.
      params: the parameters after the last step.
      data: the data of the run.
      workdir: folder of the run.
      argv: the command line of the run, on which the next commands are based.
      stop: the requests to stop.
    """
    if not is_first():
        return
    rows = read_rows(workdir)
    for line in describe_result(rows, workdir):
        log(line)
    with contextlib.suppress(KeyboardInterrupt), stop.interrupting():
        _try("picture", lambda: _draw(config, rows, workdir))
        if jax.process_count() == 1:  # otherwise all processes would have to take part
            _try("sample", lambda: _print_sample(config, params, data, workdir))
    log("next:")
    for command in next_commands(argv, workdir, config.train.steps):
        log(f"  {command}")


def describe_result(rows: Sequence[Row], workdir: str) -> list[str]:
    """Return lines with the time, the tokens, the validation results and the checkpoint."""
    lines = []
    if rows:
        last, seconds = rows[-1], elapsed_seconds(rows)[-1]
        time = "" if seconds is None else f" in {clock(seconds)} of train steps"
        lines.append(f"done: {last['step']:,} steps, {last['tokens']:,} tokens{time}")
    scored = [row for row in rows if row.get("validation_bits_per_byte") is not None]
    if scored:
        best = min(scored, key=lambda row: row["validation_bits_per_byte"])
        lines.append(
            f"validation: {scored[-1]['validation_bits_per_byte']:.4f} bits/byte at the end, "
            f"{best['validation_bits_per_byte']:.4f} at best (step {best['step']:,})"
        )
    lines.append(f"checkpoint: {directory(workdir) / str(latest_step(workdir))}")
    return lines


def next_commands(argv: Sequence[str], workdir: str, steps: int) -> list[str]:
    """Return command lines that evaluate the run, generate text with it, and train it further.

    Args:
      argv: the command line of the run, as sys.argv.
      workdir: folder of the run.
      steps: the number of the run's steps.
    """
    evaluate = ["python", "eval.py"] if _is_script(argv) else ["flowhn", "eval"]
    program, arguments = _program_and_arguments(argv)
    kept = []
    while arguments:
        argument = arguments.pop(0)
        if argument == _STEPS_FLAG:  # its value is the next argument
            del arguments[:1]
        elif not argument.startswith(f"{_STEPS_FLAG}="):
            kept.append(argument)
    at = f"--workdir={workdir}"
    return [
        shlex.join([*evaluate, at, "--mode=perplexity"]),
        shlex.join([*evaluate, at, "--mode=generate", "--prompt=The"]),
        shlex.join([*program, *kept, f"{_STEPS_FLAG}={2 * steps}"]),
    ]


def command_line(argv: Sequence[str]) -> str:
    """Return the command line of a run in one line, as a shell reads it.

    Args:
      argv: the arguments of the process, as sys.argv.
    """
    program, arguments = _program_and_arguments(argv)
    return shlex.join([*program, *arguments])


def _program_and_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    if _is_script(argv):
        return ["python", argv[0]], list(argv[1:])
    return ["flowhn", "train"], list(argv[2:] if argv[1:2] == ["train"] else argv[1:])


def _is_script(argv: Sequence[str]) -> bool:
    return pathlib.Path(argv[0]).name == "train.py"


def _try(name: str, work: Callable[[], None]) -> None:
    """Do optional work; log an error instead of raising it."""
    try:
        work()
    except Exception as error:  # such as a full disk, or too little memory on the device
        log(f"skipped the {name}: {one_line(error)}")


def _draw(config: Config, rows: Sequence[Row], workdir: str) -> None:
    """Draw the losses to `loss.png` in the workdir; the file is written atomically."""
    path = place(workdir) / PICTURE
    with tempfile.TemporaryDirectory() as folder:
        drawn = pathlib.Path(folder) / PICTURE
        plot_losses(rows, f"{config.model.name}: loss", str(drawn))
        path.write_whole(drawn.read_bytes())
    log(f"loss curve: {path}")


def _print_sample(config: Config, params: Params, data: RunData, workdir: str) -> None:
    """Print about 100 bytes that the model generates after the beginning of the validation set.

    Of a mixture it is that of the set with the largest weight. The workdir keeps the text as
    sample.json.
    """
    prepared = data.main
    if not models.can_decode(config.model):
        raise ValueError(
            f"{config.model.name} cannot generate token by token; see model.split.scope"
        )
    split = prepared.splits["validation"]
    bytes_per_token = max(1.0, split.bytes / max(1, split.tokens))
    window = prepared.windows("validation")[0]
    document = window["tokens"][window["segment_ids"] == window["segment_ids"][0]]
    length = min(math.ceil(_PROMPT_BYTES / bytes_per_token), config.model.context // 2)
    prompt: list[int] = np.asarray(document[:length]).tolist()
    with activity("generating a sample"):
        (sample,) = generate(
            config.model,
            params,
            [prompt],
            tokenizer=prepared.tokenizer,
            max_new_tokens=math.ceil(_SAMPLE_BYTES / bytes_per_token),
            sampling=_SAMPLING,
        )
    log(f"sample, after {_printable(sample.prompt)!r}:")
    for line in _printable(sample.text).splitlines():
        log(f"  | {line}")
    write_sample(workdir, Sample(config.train.steps, sample.prompt, sample.text))


def _printable(text: str) -> str:
    """Return a text without control characters and what the terminal's encoding cannot show."""
    plain = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return plain.encode(encoding, "replace").decode(encoding)
