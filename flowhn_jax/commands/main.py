"""The command `flowhn COMMAND ...`: every command of the package under one name.

Nothing heavy is imported before a command is chosen, so that `flowhn --help` answers at once.
"""

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flowhn_jax.utils.text import short_repr
from flowhn_jax.utils.version import __version__


class Command(NamedTuple):
    """Where a command is, and what it does.

    Attributes:
      module: the module whose `run(argv)` runs it.
      summary: one line, imperative.
      example: its arguments in a typical call.
    """

    module: str
    summary: str
    example: str


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "train",
        "Train a model; with the workdir of an earlier run, resume it.",
        "--config=flowhn_tiny:fai_split --workdir=runs/tiny",
    ),
    "eval": Command(
        "eval",
        "Evaluate a trained model, measure its throughput, or generate text.",
        '--workdir=runs/tiny --mode=generate --prompt="def main("',
    ),
    "prepare": Command(
        "prepare",
        "Turn text into token windows on disk, for training and validation.",
        "--source=FOLDER --tokenizer=bytes --out=data/mine --context=256",
    ),
    "synthetic": Command(
        "synthetic",
        "Write synthetic recall texts, as .jsonl for `flowhn prepare`.",
        "--out=recall.jsonl",
    ),
    "split": Command(
        "split",
        "Print which tokens each block sends to which branch, and draw it.",
        "--config=flowhn_135m:fac_split --plot=plan.png",
    ),
    "compare": Command(
        "compare",
        "Measure FlowHN and its baselines on this machine: speed, memory, bits per byte.",
        "--size=tiny --budget=tokens:2e6",
    ),
    "report": Command(
        "report",
        "Make one HTML page of runs: curves, speed, config differences and samples.",
        "runs/tiny --out=report.html",
    ),
    "sweep": Command(
        "sweep",
        "Train a recipe over a grid of config keys, and put the results into a table.",
        "--config=flowhn_tiny --workdir=runs/rates --grid=train.learning_rate=1e-3,3e-3 "
        "--grid=train.seed=0,1,2",
    ),
    "aot": Command(
        "aot",
        "Compile a train step for absent hardware: its memory and its communication.",
        "--config=flowhn_1b --topology=v5e:4x4 --plan_only --config.mesh.data=1 "
        "--config.mesh.fsdp=-1",
    ),
    "bench": Command(
        "bench",
        "Measure a machine or parts of the code: suite, kernels, branches, decode and others.",
        "suite --minutes=8 --out=runs/suite",
    ),
    "export": Command(
        "export_model",
        "Write a run's model as safetensors with a Hugging Face config.",
        "--workdir=runs/tiny --out=exported",
    ),
    "import": Command(
        "import_model",
        "Make a workdir of a folder with safetensors and a Hugging Face config.",
        "--source=exported --workdir=runs/imported",
    ),
}


def overview(program: str = "flowhn", names: Sequence[str] = tuple(COMMANDS)) -> str:
    """Return the help of a program with several commands: one line for each."""
    width = max(map(len, names))
    lines = [f"{name:<{width}}  {COMMANDS[name].summary}" for name in names]
    return "\n".join(
        [
            f"usage: {program} COMMAND [--FLAG=VALUE ...]",
            "",
            "commands:",
            *(f"  {line}" for line in lines),
            "",
            f"{program} COMMAND --help lists the flags of a command.",
        ]
    )


def run(
    argv: Sequence[str] | None = None,
    program: str = "flowhn",
    names: Sequence[str] = tuple(COMMANDS),
) -> None:
    """Run the command that the first argument names, with the arguments after it.

    Args:
      argv: the arguments; None: those of the process.
      program: what the program is called in its help.
      names: the commands that it has.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = next((i for i, argument in enumerate(arguments) if argument in names), None)
    flags_first = at is not None and all(each.startswith("-") for each in arguments[:at])
    if at is not None and flags_first:
        name = arguments.pop(at)
        importlib.import_module(f"flowhn_jax.commands.{COMMANDS[name].module}").run(arguments)
    elif not arguments or arguments[0] in ("--help", "-h", "-help", "help"):
        print(overview(program, names))
    elif arguments[0] == "--version":
        print(f"{program} {__version__}")
    else:
        near = difflib.get_close_matches(arguments[0], names, n=1)
        hint = f"; perhaps {near[0]}" if near else ""
        sys.exit(
            f"error: the command must be one of {', '.join(names)}; got "
            f"{short_repr(arguments[0])}{hint}. Type {program} --help."
        )


if __name__ == "__main__":
    run()
