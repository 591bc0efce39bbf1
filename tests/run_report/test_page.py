"""The page about runs: what it holds, and that it needs nothing outside of it."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.evaluation import by_position
from flowhn_jax.run_report.page import write
from flowhn_jax.storage import place
from flowhn_jax.training.sample import Sample, write_sample
from tests.command_line import call
from tests.small import small_baseline, small_config

STEPS = 40
SAMPLE = 'if a < b & c:\n    return "\x00\ud800"'


def write_run(folder, config, rng, losses=None):
    """Write a workdir with rows, as a run would; return its rows."""
    folder = place(folder)
    folder.make_folder()
    (folder / "config.json").write_whole(json.dumps(config_lib.to_dict(config)))
    rows = []
    for number, step in enumerate(range(4, STEPS + 1, 4)):
        loss = losses[number] if losses else float(rng.uniform(1, 6))
        row = {"step": step, "loss": loss, "tokens": step * 192, "step_seconds": 2.0, "mfu": None}
        row |= {"tokens_per_second": float(rng.uniform(1e3, 2e3))}
        if step % 20 == 0:
            row["validation_bits_per_byte"] = float(rng.uniform(1, 4))
        rows.append(row)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_whole(text)
    return rows


def parsed(path):
    """Return the page as a tree; well-formed HTML is XML."""
    return ElementTree.fromstring(place(path).read_text())


def figures(root):
    return {each.find("figcaption").text: each for each in root.iter("figure")}


def cells(root, heading):
    """Return the first table of a section as rows of texts."""
    section = next(each for each in root.iter("section") if each.find("h2").text == heading)
    return [["".join(cell.itertext()) for cell in row] for row in section.iter("tr")]


@pytest.fixture
def config():
    return small_config(train={"steps": STEPS})


@pytest.fixture
def two_runs(tmp_path, rng, config):
    """Two runs, of FlowHN with all that a workdir can have and of a baseline; and their rows."""
    baseline = config_lib.parse(
        config_lib.to_dict(config) | {"model": config_lib.to_dict(small_baseline("llama"))}
    )
    rows = [
        write_run(tmp_path / name, each, rng)
        for name, each in (("ours", config), ("llama", baseline))
    ]
    nll = rng.uniform(1, 4, 24)
    targets = np.full(24, 9)
    curve = by_position.Curve(nll * targets, (nll**2 + 0.25) * targets, targets)
    by_position.write(curve, "ours", str(tmp_path / "ours"))
    write_sample(str(tmp_path / "ours"), Sample(STEPS, "The ", SAMPLE))
    write([str(tmp_path / "ours"), str(tmp_path / "llama")], str(tmp_path / "page.html"))
    return tmp_path, rows


def test_each_figure_has_the_data_of_each_run(two_runs):
    folder, rows = two_runs
    found = figures(parsed(folder / "page.html"))
    assert list(found) == ["Training loss", "Validation", "Speed", "Loss by position"]
    for title, key in (("Training loss", "loss"), ("Speed", "tokens_per_second")):
        lines = list(found[title].iter("polyline"))
        assert len(lines) == 2
        for line, of_run in zip(lines, rows, strict=True):
            points = [tuple(map(float, each.split(","))) for each in line.get("points").split()]
            values = np.array([row[key] for row in of_run])
            assert len(points) == len(values)
            places = np.array([y for _, y in points])
            assert np.corrcoef(places, values)[0, 1] == pytest.approx(-1, abs=1e-3)
    titles = (each.find("title") for each in found["Validation"].iter("circle"))
    expected = [
        f"{name}: {row['validation_bits_per_byte']:.4f} at {row['tokens']:,}"
        for name, of_run in zip(("ours", "llama"), rows, strict=True)
        for row in of_run
        if "validation_bits_per_byte" in row
    ]
    assert [each.text for each in titles if each is not None] == expected
    assert len(list(found["Loss by position"].iter("polyline"))) == 1
    for title, figure in found.items():
        names = [each.text or each[0].tail for each in figure.iter("li")]
        assert names == (["ours"] if title == "Loss by position" else ["ours", "llama"])


def test_the_summary_and_the_differences(two_runs, config):
    folder, rows = two_runs
    root = parsed(folder / "page.html")
    _, ours, llama = cells(root, "Summary")
    assert ours[:6] == [
        "ours", "fac_split", f"{models.param_count(config.model):,}", "40", f"{40 * 192:,}", "1:20"
    ]  # fmt: skip
    scored = [row for row in rows[0] if "validation_bits_per_byte" in row]
    best = min(scored, key=lambda row: row["validation_bits_per_byte"])
    assert ours[7] == f"{scored[-1]['validation_bits_per_byte']:.4f}"
    assert ours[8] == f"{best['validation_bits_per_byte']:.4f} (step {best['step']})"
    assert ours[9] == f"{np.median([row['tokens_per_second'] for row in rows[0]]):,.0f}"
    assert llama[1] == "llama"
    differing = {row[0]: row[1:] for row in cells(root, "Config, where the runs differ")}
    assert differing["model.kind"] == ["flowhn", "llama"]
    assert differing["model.split.period"] == ["7", "\N{EN DASH}"]  # llama does not read it
    assert "train.steps" not in differing
    assert "model.split.stem" not in differing  # at its default
    common = cells(root, "Config, other than the defaults in all runs")
    assert ["train.steps", "40", "1000"] in common


def test_a_sample_is_shown_as_text(two_runs):
    (sample,) = parsed(two_runs[0] / "page.html").iter("pre")
    assert "".join(sample.itertext()) == "The " + SAMPLE.replace("\x00\ud800", "\ufffd\ufffd")


def test_the_page_loads_nothing(two_runs):
    text = (two_runs[0] / "page.html").read_text()
    assert not re.search(r"https?:|//|url\(|@import|<(script|link|img|iframe|object|embed)\b", text)
    assert not re.search(r"\b(src|href|srcset|action)\s*=", text)
    assert "prefers-color-scheme:dark" in text
    assert 'content="width=device-width' in text


def test_a_run_without_rows_and_one_with_gaps(tmp_path, rng, config):
    losses = [1.0, 2.0, None, float("nan"), 2.0, "4", 3.0, 1.0, 1.0, float("inf")]
    write_run(tmp_path / "gaps", config, rng, losses)
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(tmp_path / "gaps" / "config.json", new)
    write([str(tmp_path / "gaps"), str(new)], str(tmp_path / "page.html"))
    found = figures(parsed(tmp_path / "page.html"))
    lines = [each.get("points").split() for each in found["Training loss"].iter("polyline")]
    assert [len(line) for line in lines] == [2, 3]
    write([str(new)], str(tmp_path / "page.html"))
    assert "No rows yet." in (tmp_path / "page.html").read_text()


def test_a_long_run_has_few_points_with_the_same_mean(tmp_path, rng, config):
    workdir = tmp_path / "run"
    write_run(workdir, config, rng)
    values = rng.uniform(1, 6, 3000)
    with (workdir / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(values.tolist(), 1):
            file.write(json.dumps({"step": step, "tokens": step, "loss": loss}) + "\n")
    write([str(workdir)], str(tmp_path / "page.html"))
    (line,) = figures(parsed(tmp_path / "page.html"))["Training loss"].iter("polyline")
    assert len(line.get("points").split()) == 300


def test_runs_of_one_name_have_their_paths(tmp_path, rng, config):
    folders = [str(tmp_path / name / "run") for name in "ab"]
    for folder in folders:
        write_run(folder, config, rng)
    write(folders, str(tmp_path / "page.html"))
    assert [row[0] for row in cells(parsed(tmp_path / "page.html"), "Summary")[1:]] == folders
    with pytest.raises(ValueError, match=r"each folder must be given once; got .*run' twice"):
        write([folders[0], f"{folders[0]}/"], str(tmp_path / "page.html"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sample.json", '{"step": 1}'),
        ("sample.json", "{"),
        ("metrics.jsonl", 'x\n{"step": 1}\n'),
        ("by_position.csv", "tokens_before,nll,standard_error,targets\n1,x,,3\n"),
        ("by_position.csv", "tokens_before,nll,standard_error,targets\n0,1.5,,3\n"),
        ("by_position.csv", "tokens_before,nll,standard_error,targets\n99999999999,1.5,,3\n"),
        ("by_position.csv", "nll\n1\n"),
        ("by_position.csv", ""),
    ],
)
def test_a_damaged_file_is_named(tmp_path, rng, config, file, content):
    write_run(tmp_path / "run", config, rng)
    (tmp_path / "run" / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file}' is damaged"):
        write([str(tmp_path / "run")], str(tmp_path / "page.html"))


def test_the_curve_by_position_is_read_back(tmp_path, rng):
    losses = [rng.uniform(0, 5, count) for count in (1, 7, 0, 4)]
    curve = by_position.Curve(
        np.array([each.sum() for each in losses]),
        np.array([np.square(each).sum() for each in losses]),
        np.array([len(each) for each in losses]),
    )
    by_position.write(curve, "ours", str(tmp_path))
    found = by_position.read(str(tmp_path))
    for each, expected in zip(found, curve, strict=True):
        np.testing.assert_allclose(each[[1, 2, 3]], expected[[1, 2, 3]], rtol=1e-9)
    np.testing.assert_allclose(found.nll, curve.nll)
    assert by_position.read(str(tmp_path / "nowhere")) is None


def test_the_command_reads_and_writes_a_bucket(bucket, rng, config):
    for name in ("a", "b"):
        write_run(f"{bucket}/{name}", config, rng)
    run = call(
        "-m", "flowhn_jax", "report", f"{bucket}/a", f"{bucket}/b", f"--out={bucket}/page.html"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"wrote {bucket}/page.html\n"
    assert list(figures(parsed(f"{bucket}/page.html"))) == ["Training loss", "Validation", "Speed"]


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_a_browser_lays_the_page_out_at_the_width_of_a_phone(two_runs):
    """No part but the tables, which scroll, is wider than the page."""
    folder, _ = two_runs
    probe = (
        "<script>document.title = JSON.stringify([innerWidth, document.body.scrollWidth, "
        "[...document.querySelectorAll('figure>svg')].map(e => "
        "e.getBoundingClientRect().width), [...document.querySelectorAll('figure>svg')].map(e => "
        "e.getBoundingClientRect().height)])</script>"
    )
    text = (folder / "page.html").read_text().replace("</main>", f"</main>{probe}")
    (folder / "probed.html").write_text(text)
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=500,900"]
    run = subprocess.run(
        [*command, f"file://{folder / 'probed.html'}"], capture_output=True, text=True, check=True
    )
    (title,) = re.findall("<title>(.*?)</title>", run.stdout)[:1]
    width, scrolled, widths, heights = json.loads(title)
    assert scrolled <= width
    assert len(widths) == 4
    assert all(0.8 * width < each <= width for each in widths)
    assert all(each > 150 for each in heights)
