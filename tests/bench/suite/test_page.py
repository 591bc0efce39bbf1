"""suite.md of complete, partial and failed rows."""

import json
import re

import pytest

from flowhn_jax.bench.suite import figures, page
from flowhn_jax.bench.suite.document import FILE, Document
from flowhn_jax.bench.suite.parts import PARTS
from tests.bench.suite import rows

TITLES = {part.name: part.title for part in PARTS}


def document_of(folder, rows_of_parts):
    """Return a document that was saved and opened again, so that NaN became null."""
    document = Document(folder)
    document.content["machine"] = {"device": "NVIDIA H100", "devices": 1}
    document.content["seconds"] = 90.0
    for name, of_part in rows_of_parts.items():
        document.part(name)["planned"] = [row["key"] for row in of_part]
        document.part(name)["rows"] = of_part
    document.save()
    return Document.open(folder)


def page_of(folder, rows_of_parts, drawn=()):
    return page.render(document_of(folder, rows_of_parts), PARTS, drawn)


def cells(text, *columns):
    """Return the cells of the first table row that contains all of `columns`."""
    for line in text.splitlines():
        found = [cell.strip() for cell in line.strip("|").split("|")]
        if set(columns) <= set(found):
            return found
    raise AssertionError(columns)


def test_tables_are_whole(tmp_path):
    text = page_of(tmp_path, rows.every_part(), ["training.png", "learning.png"])
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == 11
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert text.endswith("\n\n![training](training.png)\n\n![learning](learning.png)\n")
    for title in TITLES.values():
        assert f"\n## {title}\n" in text
    assert "failed" not in text.replace("OutOfMemoryError", "")
    assert "## Missing" not in text
    assert "nan" not in text


def test_numbers_of_the_tables(tmp_path):
    text = page_of(tmp_path, rows.every_part())
    assert text.startswith("# FlowHN on 1 x NVIDIA H100\n\nMeasured in 1.5 minutes; code ")
    found = cells(text, "135m fac_split", "132,396,448")
    assert found[2:6] == ["32 (memory)", "125,000", "1.25", "25.0"]
    assert found[7:9] == ["262.1 (235.9 to 288.4)", "62.5"]  # measured, and the bound
    assert cells(text, "1b fac_split", "132,396,448")[4:6] == ["n/a", "n/a"]
    assert "701.00 TFLOP/s" in cells(text, "matrix products, bfloat16")
    assert cells(text, "train step of ae_split at 135m")[1:] == [
        "100.00",
        "3,000.00",
        "30.00",
    ]
    assert "Kernels of the authors' code: scan: a loop over tokens" in text
    assert cells(text, "16 x 32 x 2")[3:] == ["2.000", "chosen"]
    assert cells(text, "16 x 32 x 4")[3:] == ["3.000", "default"]
    assert "the curves differ by at most 0.1250" in text
    assert cells(text, "200", "2.3350") == ["200", "2.3350", "2.2100"]
    assert "OutOfMemoryError: 12 GiB" in cells(text, "peer")
    assert cells(text, "forward/dot_general", "fusion.2")[1:3] == [
        "flowhn_jax/layers/mamba1.py:82",
        "10.0",
    ]


def test_wrong_numbers_come_first(tmp_path):
    text = page_of(tmp_path, rows.every_part())
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert "Wrong numbers" in headings[0]
    assert headings[1:] == list(TITLES.values())
    first = text[text.index("Wrong numbers") : text.index(f"## {headings[1]}")]
    assert "**WRONG**" in first
    assert "attention/plain" in first
    assert "selective_scan" not in first


def test_no_heading_of_wrong_numbers_if_all_are_right(tmp_path):
    right = rows.accuracy("attention/plain/cudnn/float32", True)
    text = page_of(tmp_path, {"accuracy": [right]})
    assert "rong" not in text
    assert "WRONG" not in text


def test_unsupported_arguments_are_neither_wrong_nor_missing(tmp_path):
    key = "attention/window, prefix/cudnn/float32"
    unserved = {"key": key, "check": "attention/window, prefix", "backend": "cudnn"}
    unserved |= {"dtype": "float32", "unserved": "no prefix", "summary": "not served"}
    text = page_of(tmp_path, {"accuracy": [unserved]})
    assert f"\n- {key} unserved: no prefix\n" in text
    assert "WRONG" not in text
    assert TITLES["accuracy"] not in text[text.index("## Missing") :].partition("\n## ")[0]


def test_numbers_that_are_not_finite_are_wrong(tmp_path):
    nan = float("nan")
    wrong = rows.accuracy("ssd/plain/xla/float32", False, error=nan, gradient_error=nan)
    text = page_of(tmp_path, {"accuracy": [wrong]})
    assert "**WRONG**" in cells(text, "ssd/plain")
    assert (
        json.loads((tmp_path / FILE).read_text())["parts"]["accuracy"]["rows"][0]["error"] is None
    )


def test_what_is_missing_is_named(tmp_path):
    document = document_of(tmp_path, rows.every_part())
    document.part("accuracy")["planned"] += [f"check {i}" for i in range(9)]
    document.part("inference")["failed"] = "ImportError: no flax"
    del document.content["parts"]["learning"]
    del document.content["parts"]["tiles"]["rows"][0]
    text = page.render(document, PARTS, ())
    start = text.index("## Missing")
    lines = text[start : text.index("\n## ", start)].strip().splitlines()[2:]
    shown = ", ".join(f"check {i}" for i in range(6))
    assert lines == [
        f"- {TITLES['accuracy']}: {shown} and 3 more",
        f"- {TITLES['inference']}: failed: ImportError: no flax",
        f"- {TITLES['tiles']}: selective_scan/135m/1024",
        f"- {TITLES['learning']}: all of it",
    ]
    assert text.index("Wrong numbers") < start


def test_nothing_is_measured_yet(tmp_path):
    text = page.render(Document(tmp_path), PARTS, ())
    assert text.startswith("# FlowHN on ? x ?\n")
    assert text.count(": all of it") == len(PARTS)


@pytest.mark.parametrize("name", TITLES)
def test_rows_that_are_not_complete(tmp_path, name):
    of_part = rows.unfinished()[name]
    text = page_of(tmp_path, {name: of_part})
    assert f"\n## {TITLES[name]}\n" in text
    for row in of_part:
        if "failed" in row:
            assert f"- {row['key']} failed: {row['failed']}" in text


@pytest.mark.parametrize("name", TITLES)
def test_a_crash_is_a_line_of_the_page(tmp_path, name):
    """Rows that the supervisor itself writes have only a key and a message."""
    crash = {"key": "135m/no_split", "failed": "the worker process died (SIGKILL)"}
    text = page_of(tmp_path, {name: [crash]})
    assert "- 135m/no_split failed: the worker process died (SIGKILL)" in text


@pytest.mark.parametrize("steps", [1, 19, 20, 49, 60])
def test_learning_that_has_only_begun(tmp_path, steps):
    text = page_of(tmp_path, {"learning": [rows.learning("bfloat16", steps)]})
    assert cells(text, "50")[1] == ("n/a" if steps < 50 else "5.2100")
    assert "differ" not in text


def test_learning_that_diverges(tmp_path):
    """NaN is null in suite.json."""
    diverged = rows.learning("bfloat16")
    diverged["losses"][120:] = [float("nan")] * 80
    text = page_of(tmp_path, {"learning": [diverged, rows.learning("float32")]})
    assert cells(text, "100")[1] == "4.2100"
    assert cells(text, "200")[2] == "2.2100"


def draw(tmp_path, rows_of_parts):
    pytest.importorskip("matplotlib")
    return figures.draw(document_of(tmp_path, rows_of_parts).rows())


def test_four_figures_at_most(tmp_path):
    drawn = draw(tmp_path, rows.every_part())
    assert sorted(drawn) == ["costs.png", "kernels.png", "learning.png", "training.png"]
    for data in drawn.values():
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert 5_000 < len(data) < 2**24


def test_figures_are_closed(tmp_path):
    draw(tmp_path, rows.every_part())
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


def test_no_figures_without_rows(tmp_path):
    assert draw(tmp_path, {}) == {}


def test_figures_of_rows_that_are_not_complete(tmp_path):
    """Models that were not timed and kernels that all failed have nothing to draw."""
    drawn = draw(tmp_path, rows.unfinished())
    assert list(drawn) == ["learning.png"]


@pytest.mark.parametrize(
    "of_part",
    [
        {"training": [rows.training("135m/llama", 1e5), rows.described("1b/llama")]},
        {"kernel_speed": [{"key": "x", "measurements": [rows.measurement("triton", 2.0)]}]},
        {"step_costs": [rows.costs("135m/fac_split", 10)]},
        {"learning": [rows.learning("float32")]},
        {"learning": [rows.learning("bfloat16", 1)]},
        {"learning": [rows.learning("bfloat16", 20), rows.learning("float32", 7)]},
    ],
    ids=lambda of_part: next(iter(of_part)),
)
def test_a_figure_of_a_few_rows(tmp_path, of_part):
    drawn = draw(tmp_path, of_part)
    assert len(drawn) == 1
    assert all(data.startswith(b"\x89PNG") for data in drawn.values())


def test_a_figure_of_learning_that_diverges(tmp_path):
    diverged = rows.learning("bfloat16")
    diverged["losses"][120:] = [float("nan")] * 80
    assert draw(tmp_path, {"learning": [diverged, rows.learning("float32")]})


def test_a_step_without_costs_has_no_figure(tmp_path):
    assert draw(tmp_path, {"step_costs": [rows.costs("135m/fac_split", 0)]}) == {}
