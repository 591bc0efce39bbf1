"""docs/reference.md is what the code says."""

import json

from tests.command_line import call
from tests.commands.test_commands import TINY, succeed
from tools.reference import METRICS, WORKDIR


def test_the_page_is_what_the_command_writes():
    run = call("tools/reference.py", "--check")
    assert run.returncode == 0, run.stderr


def test_files_and_rows_of_a_run_are_listed(tmp_path):
    sizes = ["--config.model.width=32", "--config.model.mlp_width=32", "--config.model.blocks=2"]
    sizes += ["--config.model.context=32", "--config.train.batch_size=4"]
    steps = ["--config.train.steps=3", "--config.train.eval_windows=4"]
    workdir = tmp_path / "run"
    succeed("train.py", TINY, f"--workdir={workdir}", *sizes, *steps)
    listed = {name.strip().split("/")[0] for names, _ in WORKDIR for name in names.split(",")}
    assert {path.name for path in workdir.iterdir()} <= listed
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row} == {key for key, _ in METRICS}
