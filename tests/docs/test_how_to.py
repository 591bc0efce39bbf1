"""Each page of docs/how-to works: its blocks are applied and run in a copy of the repository."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
COPIED = (
    "configs",
    "flowhn_jax",
    "kernels",
    "tests",
    "tools",
    "train.py",
    "eval.py",
    "pyproject.toml",
)

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The last words before a block of Python or a diff say what to do with it.
INSTRUCTION = re.compile(r"\b(Append to|Create|Edit)\s+`([\w./-]+)`:\s*\Z")


class Block(NamedTuple):
    """A code block: its language, text and, for a file, what to do with it."""

    language: str
    text: str
    action: str = ""
    path: str = ""


def blocks_of(page):
    """Yield the blocks of a page in order.

    Raises:
      ValueError: no words before a block say to which file it belongs.
    """
    file = ()  # of the block before, as several diffs may follow one instruction
    end = 0
    for found in BLOCK.finditer(page):
        language, text = found.groups()
        before = page[end : found.start()]
        end = found.end()
        if language in ("python", "diff"):
            if instruction := INSTRUCTION.search(before):
                file = instruction.groups()
            elif before.strip() or not file:
                raise ValueError(f"no instruction before the block\n{text}")
            yield Block(language, text, *file)
        else:
            yield Block(language, text)


def apply(block, folder):
    """Write, append or edit the file of a block."""
    path = folder / block.path
    if block.action == "Create":
        assert not path.exists(), f"{block.path} exists already"
        path.write_text(block.text)
    elif block.action == "Append to":
        path.write_text(path.read_text() + block.text)
    else:
        lines = block.text.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        content = path.read_text()
        assert content.count(old) == 1, f"{block.path} must contain once:\n{old}"
        path.write_text(content.replace(old, new))


def run(commands, folder):
    """Run shell commands in the folder; return their output."""
    environment = os.environ | {
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    }
    environment.pop("XLA_FLAGS", None)  # that of the tests: eight devices
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, env=environment, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{commands}\n{output[-8000:]}"
    return output


@pytest.fixture
def repository(tmp_path):
    """Return a copy of the repository, without the fixtures of other tests."""
    ignored = shutil.ignore_patterns("__pycache__", "golden")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=() if page.stem == "mixer" else pytest.mark.slow)
        for page in PAGES
    ],
)
def test_page(page, repository):
    for block in blocks_of(page.read_text()):
        if block.action:
            apply(block, repository)
        elif not block.language:
            print(run(block.text, repository))


def test_blocks_are_found_and_applied(tmp_path):
    page = (
        "Append to `a.py`:\n```python\nx = 1\n```\n"
        "Edit `a.py`:\n```diff\n-x = 1\n+x = 2\n y = 3\n```\n```diff\n y = 3\n+z = 4\n```\n"
        "Run:\n```\necho $PWD\n```\n```text\nwords\n```\n"
    )
    (tmp_path / "a.py").write_text("")
    blocks = list(blocks_of(page))
    assert [block.language for block in blocks] == ["python", "diff", "diff", "", "text"]
    apply(blocks[0], tmp_path)
    with pytest.raises(AssertionError, match=r"a\.py must contain once"):
        apply(blocks[1], tmp_path)
    (tmp_path / "a.py").write_text("x = 1\ny = 3\n")
    apply(blocks[1], tmp_path)
    apply(blocks[2], tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 2\ny = 3\nz = 4\n"
    assert str(tmp_path) in run(blocks[3].text, tmp_path)
    with pytest.raises(AssertionError, match="exit 3"):
        run("exit 3", tmp_path)
    with pytest.raises(ValueError, match="no instruction before the block"):
        list(blocks_of("Look:\n```python\nx = 1\n```\n"))
