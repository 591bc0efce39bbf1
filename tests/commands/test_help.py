"""`flowhn`, its commands and their help."""

import subprocess
import sys

import pytest

from flowhn_jax import __version__, config
from flowhn_jax.commands.main import COMMANDS, overview
from tests.command_line import ROOT, call
from tests.commands.test_commands import succeed
from tests.small import keys

WITH_CONFIG = ("train", "eval", "split", "sweep", "aot", "bench")


def test_the_overview_has_one_line_per_command():
    assert succeed("-m", "flowhn_jax.commands.main").stdout == overview() + "\n"
    lines = [line for line in overview().splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(len(line) < 100 for line in lines)
    version = succeed("-m", "flowhn_jax", "--version").stdout
    assert version == f"python -m flowhn_jax {__version__}\n"


@pytest.mark.parametrize("command", [["--help"], ["prepare", "--help"], ["export", "--help"]])
def test_help_without_a_config_imports_no_jax(command):
    code = (
        f"import sys; from flowhn_jax.commands.main import run; run({command}); "
        "assert not {'jax', 'numpy', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command):
    text = succeed("-m", "flowhn_jax", command, "--help").stdout
    assert text.startswith(COMMANDS[command].summary)
    assert f"flowhn {command} {COMMANDS[command].example}" in text
    assert ".py:\n" not in text  # headings are words, not the files that define the flags
    for key in keys(config.default().to_dict()):
        assert (f"--config.{key}=" in text) == (command in WITH_CONFIG)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_help_of_the_scripts():
    assert "--workdir=TEXT" in succeed("train.py", "--help").stdout
    assert "--mode=generate:" in succeed("eval.py", "--help").stdout


def test_every_example_has_known_flags():
    """Each example is parsed, with a flag that is not there as the only error."""
    for name, command in COMMANDS.items():
        arguments = command.example.replace('"', "").split()
        run = call("-m", "flowhn_jax", name, *arguments, "--no_such_flag_=1")
        assert "unknown flag --no_such_flag_" in run.stderr, run.stderr


@pytest.mark.parametrize("arguments", [["--config", "flowhn_tiny"], ["--config=flowhn_tiny"]])
def test_flags_before_and_after_the_command(arguments):
    assert "1,681,184 parameters" in succeed("-m", "flowhn_jax", "split", *arguments).stdout
    if len(arguments) == 1:
        assert "1,681,184 parameters" in succeed("-m", "flowhn_jax", *arguments, "split").stdout
