"""`python -m flowhn_jax.bench suite` from the command line."""

import json
import time

import pytest

from tests.command_line import call

MESSAGES = {
    "--compare A": "--compare takes two folders, as in --compare A B; got 1.",
    "X Y": "--compare",
    "--compare A B": "'A' has none. Give the --out of a `bench suite` that has run.",
    "--minutes=0": "--minutes must be a number in the range [0.05, 1440]; got 0.0",
    "--topology=h100": "--topology must be one of v4:2x2x1",
}


@pytest.mark.parametrize("arguments", MESSAGES)
def test_bad_input_is_one_message(arguments):
    run = call("-m", "flowhn_jax.bench", "suite", *arguments.split())
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert MESSAGES[arguments] in lines[0]


REQUIRED = ("machine", "accuracy", "training", "kernel_speed")


def missing(part):
    assert part["failed"] is None
    done = {row["key"] for row in part["rows"] if not row.get("partial")}
    return set(part["planned"] or ["all of it"]) - done


@pytest.mark.slow
def test_four_minutes_on_a_cpu(tmp_path):
    """The first run completes on an idle machine; on a busy one two more runs continue it.

    Each run has half a minute more for imports and figures.
    """
    out = tmp_path / "out"
    for _ in range(3):
        start = time.monotonic()
        run = call("-m", "flowhn_jax.bench", "suite", "--minutes=4", f"--out={out}")
        assert time.monotonic() - start < 4.5 * 60
        assert "wrote" in run.stdout
        parts = json.loads((out / "suite.json").read_text())["parts"]
        left = {name: missing(parts[name]) for name in REQUIRED}
        if not any(left.values()):
            break
    assert not any(left.values()), left
    assert not any("failed" in row for name in REQUIRED for row in parts[name]["rows"])
    assert all(row["right"] for row in parts["accuracy"]["rows"] if "error" in row)
    assert all("tokens_per_second" in row for row in parts["training"]["rows"])
    files = list(out.iterdir())
    assert {"suite.json", "suite.md", "suite.log", "training.png"} <= {path.name for path in files}
    assert len(files) <= 7
    assert all(path.stat().st_size < 2**24 for path in files)
