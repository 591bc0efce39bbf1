"""Two results next to each other."""

import copy
import json
import math

import pytest

from flowhn_jax.bench.suite.document import FILE, Document
from flowhn_jax.bench.suite.side_by_side import DATA, FIGURE, PAGE, compare
from tests.bench.suite import rows

# What a better machine does to a number.
MORE = ("_per_second", "_mfu")
LESS = ("_ms", "seconds", "error", "losses")


def write(folder, rows_of_parts, device="NVIDIA H100"):
    folder.mkdir(exist_ok=True)
    document = Document(folder)
    document.content["machine"] = {
        "device": device,
        "devices": 1,
        "python": "3.11.7",
        "packages": {"jax": "0.10.2"},
    }
    for name, of_part in rows_of_parts.items():
        document.part(name)["planned"] = [row["key"] for row in of_part]
        document.part(name)["rows"] = of_part
    document.save()
    return str(folder)


def better(value, name=""):
    """Return the rows with all measured numbers better by a factor of two."""
    if isinstance(value, dict):
        return {key: better(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [better(each, name) for each in value]
    if not isinstance(value, float):
        return value
    if name.endswith(MORE) or name == "ratio":
        return 2 * value
    return value / 2 if name.endswith(LESS) else value


@pytest.fixture
def pair(tmp_path):
    """Return the folders of a result and of one that is twice as good."""
    a = write(tmp_path / "a", rows.every_part())
    return a, write(tmp_path / "b", better(rows.every_part()), "NVIDIA H200")


def test_ratios_are_above_1_if_the_second_is_better(pair, tmp_path):
    """More tokens per second, fewer milliseconds, smaller errors and losses."""
    found = compare(*pair, str(tmp_path / "out"))
    assert {row["part"] for row in found} == {
        "machine",
        "accuracy",
        "training",
        "kernels, forward and backward",
        "against the authors' code",
        "inference",
        "learning",
    }
    assert {row["unit"] for row in found} > {"tokens/s", "ms", "error", "nats per token"}
    for row in found:
        assert row["ratio"] == pytest.approx(2), row
    for row in compare(*pair[::-1], str(tmp_path / "out")):
        assert row["ratio"] == pytest.approx(0.5), row
    for row in compare(pair[0], pair[0], str(tmp_path / "out")):
        assert row["ratio"] == 1, row


def test_files_are_written(pair, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "out"
    found = compare(*pair, str(out))
    assert sorted(path.name for path in out.iterdir()) == sorted([PAGE, DATA, FIGURE])
    assert json.loads((out / DATA).read_text())["rows"] == found
    assert (out / FIGURE).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = (out / PAGE).read_text()
    assert text in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    speed = ["training", "135m/no_split", "1e+05", "2e+05", "tokens/s", "2.000"]
    assert speed in lines
    assert ["device", "NVIDIA H100", "NVIDIA H200"] in lines
    assert "A ratio above 1 means that B is better." in text


def test_rows_of_only_one_result_are_left_out(tmp_path):
    a = write(tmp_path / "a", rows.every_part() | {"machine": []})
    training = [rows.training("135m/no_split", 2e5), rows.described("135m/fac_split")]
    b = write(tmp_path / "b", rows.unfinished() | {"training": training})
    found = compare(a, b, str(tmp_path / "out"))
    assert [(row["name"], row["ratio"]) for row in found] == [("135m/no_split", 2.0)]


@pytest.mark.parametrize("name", ["accuracy", "learning"])
def test_one_kind_of_numbers_in_common(tmp_path, name):
    """A figure without any ratios must be drawn too: it leaves out those of errors."""
    folders = [write(tmp_path / side, {name: rows.every_part()[name]}) for side in ("a", "b")]
    assert compare(*folders, str(tmp_path / "out"))
    assert (tmp_path / "out" / FIGURE).read_bytes().startswith(b"\x89PNG")


def test_gradients_that_are_not_finite_are_not_a_small_error(tmp_path):
    """They are null in suite.json, like the gradient of a decode step, which has none."""
    key = "attention/plain/cudnn/float32"
    rows_of_a = [rows.accuracy(key, True), rows.accuracy("ssd/plain/xla/float32", True)]
    rows_of_b = [rows.accuracy(key, False, error=1e-9, gradient_error=math.nan), rows_of_a[1]]
    a = write(tmp_path / "a", {"accuracy": rows_of_a})
    b = write(tmp_path / "b", {"accuracy": rows_of_b})
    found = {row["name"]: row["ratio"] for row in compare(a, b, str(tmp_path / "out"))}
    assert found["ssd/plain/xla/float32"] == 1
    assert found.get(key) is None or found[key] < 1


def test_losses_that_are_not_finite(tmp_path):
    diverged = rows.learning("bfloat16")
    diverged["losses"][120:] = [math.nan] * 80
    both = [diverged, rows.learning("float32")]
    a = write(tmp_path / "a", {"learning": both})
    b = write(tmp_path / "b", {"learning": [rows.learning("bfloat16"), both[1]]})
    for folders in ((a, b), (b, a)):
        found = {row["name"]: row["ratio"] for row in compare(*folders, str(tmp_path / "out"))}
        assert found["loss at step 200, float32"] == 1


def test_nothing_in_common(tmp_path):
    a = write(tmp_path / "a", {"training": [rows.training("135m/no_split", 1e5)]})
    b = write(tmp_path / "b", {"training": [rows.training("1b/no_split", 1e5)]})
    with pytest.raises(ValueError, match="needs results with a measurement in common"):
        compare(a, b, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_results(pair, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"{folder.name}' has none. Give the --out"):
            compare(pair[0], str(folder), str(tmp_path / "out"))


def damaged_is_rejected(pair, tmp_path, text):
    """Check that the file is rejected on either side, with one line that names it."""
    (tmp_path / "b" / FILE).write_text(text)
    for folders in (pair, pair[::-1]):
        with pytest.raises(ValueError, match=r"suite\.json") as caught:
            compare(*folders, str(tmp_path / "out"))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_rejected(pair, tmp_path, share):
    text = (tmp_path / "b" / FILE).read_text()
    damaged_is_rejected(pair, tmp_path, text[: int(share * len(text))])


WRONG = [None, [], [1], 3, "text"]


@pytest.mark.parametrize("name", ["format", "code", "machine", "seconds", "parts"])
def test_a_value_of_a_wrong_type_is_rejected(pair, tmp_path, name):
    content = json.loads((tmp_path / "b" / FILE).read_text())
    for value in WRONG:
        is_valid = (name == "seconds" and value == 3) or (name == "code" and value == "text")
        is_valid |= name == "machine" and value is None  # none was reached yet
        if is_valid:
            continue
        message = damaged_is_rejected(pair, tmp_path, json.dumps(content | {name: value}))
        assert ("format must be" in message) == (name == "format" and value == 3)
    del content[name]
    damaged_is_rejected(pair, tmp_path, json.dumps(content))


@pytest.mark.parametrize("name", ["planned", "rows", "postponed", "seconds"])
def test_a_part_of_a_wrong_type_is_rejected(tmp_path, name):
    """A suite that would continue in the folder rejects it."""
    write(tmp_path / "a", rows.every_part())
    content = json.loads((tmp_path / "a" / FILE).read_text())
    allowed = {
        "planned": [None, []],
        "rows": [[]],
        "postponed": [[]],
        "seconds": [3],
    }[name]
    for value in WRONG:
        if value in allowed:
            continue
        changed = copy.deepcopy(content)
        changed["parts"]["learning"][name] = value
        (tmp_path / "a" / FILE).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"suite\.json"):
            Document.open(tmp_path / "a")


def changed(rows_of_parts, part, place, value):
    """Return a copy with another value, or none, at a path in a part's first row."""
    rows_of_parts = copy.deepcopy(rows_of_parts)
    *inner, last = place
    owner = rows_of_parts[part][0]
    for key in inner:
        owner = owner[key]
    if value == "missing":
        del owner[last]
    else:
        owner[last] = value
    return rows_of_parts


DAMAGED = {
    "number for a group": ("machine", ["packages"], 3, "packages of row 'device' of machine"),
    "group for a name": ("machine", ["device"], {}, "device of row 'device' of machine"),
    "text for a number": (
        "training",
        ["step_seconds"],
        "12",
        "step_seconds of row '135m/no_split'",
    ),
    "too large for a float": ("training", ["memory_bytes"], 10**400, "memory_bytes of row"),
    "not finite": ("accuracy", ["error"], math.inf, "error of row 'selective_scan/plain/triton"),
    "true for a number": ("inference", ["batch_size"], True, "batch_size of row '135m/fac_split'"),
    "list in a list": ("learning", ["losses", 3], [1.0], "item 3 of losses of row 'bfloat16'"),
    "number for a group in a list": ("kernel_speed", ["measurements", 1], 7, "item 1 of measure"),
    "half a character": ("step_costs", ["costs", 0, "name"], "\ud800", "name of item 0 of costs"),
    "long label": ("step_costs", ["costs", 0, "source"], "x" * 10**5, "source of item 0 of costs"),
    "control character": ("tiles", ["shape"], "a\0b", "shape of row 'selective_scan/135m/1024'"),
    "nothing": ("accuracy", ["tolerance"], "missing", "must have tolerance"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_row_is_rejected(tmp_path, name):
    """A comparison and a suite that would continue reject it; either would fail on it later."""
    part, place, value, message = DAMAGED[name]
    folder = tmp_path / "a"
    write(folder, rows.every_part())
    content = json.loads((folder / FILE).read_text())
    of_parts = {key: each["rows"] for key, each in content["parts"].items()}
    content["parts"][part]["rows"] = changed(of_parts, part, place, value)[part]
    (folder / FILE).write_text(json.dumps(content))
    for use in (lambda: compare(str(folder), str(folder), "out"), lambda: Document.open(folder)):
        with pytest.raises(ValueError, match=r"suite\.json' must hold a suite's") as caught:
            use()
        assert message in str(caught.value)
        assert len(str(caught.value)) < 600


def test_a_link_in_place_of_an_unfinished_file_is_not_followed(pair, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".unfinished").symlink_to(mine)
    compare(*pair, str(tmp_path / "out"))
    assert mine.read_text() == "mine"
    assert (tmp_path / "out" / PAGE).read_text().startswith("# ")


def test_a_folder_in_place_of_a_file_is_named(pair, tmp_path):
    (tmp_path / "out" / PAGE).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"out/{PAGE}' must be a file of the suite; found a fol"):
        compare(*pair, str(tmp_path / "out"))


def test_folders_whose_names_look_like_formulas(tmp_path):
    folders = [write(tmp_path / name, rows.every_part()) for name in ("$x$", "a_$\\nope$")]
    assert compare(*folders, str(tmp_path / "out"))
