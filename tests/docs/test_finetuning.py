"""docs/guide/finetuning.md does what it says: all of it, and its first model in two steps."""

import json
import re
import runpy
import sys

import pytest

from tests.command_line import ROOT, call
from tests.docs.test_how_to import blocks_of, run

pytest.importorskip("torch")
pytest.importorskip("transformers")

PAGE = ROOT / "docs" / "guide" / "finetuning.md"
SCORED = re.compile(r"^([\d.]+) bits per byte$", re.MULTILINE)


def blocks(folder):
    """Yield the page's blocks, with the folder in place of finetune/; write its Python files."""
    (folder / "finetune").mkdir()
    for block in blocks_of(PAGE.read_text().replace("finetune/", f"{folder}/finetune/")):
        if block.action:
            path = folder / "finetune" / block.path.rpartition("/")[2]
            path.write_text(block.text)
        elif not block.language:
            yield block.text


def bits_of(output):
    """Return the bits per byte in the last line of eval.py's output."""
    return json.loads(output.strip().splitlines()[-1])["bits_per_byte"]


@pytest.mark.slow
def test_the_page(tmp_path):
    outputs = [run(text, ROOT) for text in blocks(tmp_path)]
    ours = re.findall(r'^\{.*"bits_per_byte": ([\d.]+)', "\n".join(outputs), re.MULTILINE)
    theirs = [each[1] for output in outputs for each in SCORED.finditer(output)]
    assert len(ours) == len(theirs) == 2
    assert [float(each) for each in ours] == pytest.approx([float(each) for each in theirs], 1e-5)
    assert "resuming" in outputs[-1]
    assert "step     50/50" in outputs[-1]


def test_the_first_model_in_two_steps(tmp_path, monkeypatch, capsys):
    """The page's commands for Llama, run in other processes; its Python files in this one."""
    outputs = []
    monkeypatch.setattr(sys, "argv", ["make_models.py"])
    for text in blocks(tmp_path):
        for command in text.splitlines():
            program, *arguments = command.split()
            if "falcon_h1" in command:
                continue
            if program == "head":
                (tmp_path / "finetune" / "text.txt").write_bytes(
                    (ROOT / "tests" / "data" / "wikitext.txt").read_bytes()[:1000]
                )
            elif arguments[0].startswith(str(tmp_path)):
                monkeypatch.setattr(sys, "argv", arguments)
                runpy.run_path(arguments[0])
            else:
                arguments = [re.sub(r"steps=40$", "steps=2", each) for each in arguments]
                arguments = [re.sub(r"steps=50$", "steps=3", each) for each in arguments]
                found = call(*arguments)
                assert found.returncode == 0, found.stderr
                outputs.append(found.stdout)
    prepared, trained, scored, exported, resumed = outputs
    assert "context 64" in prepared
    assert f"parameters from {tmp_path}/finetune/llama" in trained
    assert "step      2/2" in trained
    assert "llama" in exported
    assert "resuming" in resumed
    theirs = float(SCORED.findall(capsys.readouterr().out)[-1])
    assert bits_of(scored) == pytest.approx(theirs, 1e-5)
