"""The notebook runs from top to bottom on a CPU."""

import os

import pytest

from tests.command_line import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-test.txt")
nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-test.txt")


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("QUICKSTART_STEPS", "5")
    monkeypatch.setenv("QUICKSTART_WIDTH", "32")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": os.fspath(NOTEBOOK.parent)}},
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for output in code[2].outputs)
    assert "step      5/5" in text_of(code[3])
    assert "bits_per_byte" in text_of(code[5])
    assert "tokens_per_second" in text_of(code[6])
    assert "(1, 256, 384)" in str(code[7].outputs)


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
