"""The commands of docs/pods.md that need no cloud run against the emulator, in their order."""

import re

import pytest

from flowhn_jax.storage import place
from tests.command_line import ROOT, call

PAGE = ROOT / "docs" / "pods.md"
COMMAND = re.compile(r"python3?(?:\.\d+)? +((?:train\.py|eval\.py|-m flowhn_jax)[^\n\"<]*)")
# A run of seconds on a CPU: the values of the page, and those of the test.
SMALLER = {
    "configs/flowhn_1b.py": "configs/flowhn_tiny.py",
    "--context=1024": "--context=64",
    "--config.train.batch_size=256": "--config.train.batch_size=4 --config.model.context=64 "
    "--config.train.steps=2 --config.train.eval_windows=4",
}


def commands():
    """Return the arguments of the page's commands that name the bucket."""
    text = PAGE.read_text().replace("\\\n", " ")
    return [found[1].strip() for found in COMMAND.finditer(text) if "$BUCKET" in found[1]]


def test_the_page_asks_for_no_network_disk():
    text = PAGE.read_text()
    assert "filestore" not in text.lower()
    assert not re.search(r"--(workdir|out|source)=/", text)
    names = [re.split(r"[ =]", each)[0] for each in commands()]
    assert names == ["-m", "train.py", "eval.py", "-m"]


@pytest.mark.usefixtures("emulator")
@pytest.mark.slow
def test_the_commands_run(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("data.md", "training.md"):
        text = (ROOT / "docs" / "guide" / name).read_text()
        (place(bucket) / "texts" / f"{name}.txt").write_whole(text * 40)
    outputs = []
    for command in commands():
        for theirs, ours in SMALLER.items():
            command = command.replace(theirs, ours)
        run = call(*command.replace("$BUCKET", bucket).split())
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert f"{bucket}/data: context 64" in outputs[0]
    assert f"data {bucket}/data" in outputs[1]
    assert '"bits_per_byte"' in outputs[2]
    assert f"to {bucket}/exported" in outputs[3]
    assert {name for name, _ in place(f"{bucket}/exported").walk()} >= {
        "config.json",
        "model.safetensors",
    }
