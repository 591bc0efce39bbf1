import json
import math
import pathlib
import re

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from flowhn_jax import models
from flowhn_jax.config import MeshConfig
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation.scoring import Score, Scorer
from flowhn_jax.evaluation.task_files import MalformedRecord, find_file, read_task
from flowhn_jax.evaluation.task_formats import FORMATS, Item
from flowhn_jax.evaluation.tasks import TASKS, evaluate_tasks, parse_tasks, summarize, table
from flowhn_jax.parallel.mesh import make_mesh
from tests.small import small_config

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "tasks"

# A record in each task's original formats, and the harness's item for it.
ORIGINALS = [
    ("lambada", {"text": "he went to the sea"}, [("he went to the", " sea")], 0),
    (
        "piqa",
        {"goal": "open a jar", "sol1": "twist", "sol2": "throw it", "label": "1"},
        [
            ("Question: open a jar\nAnswer:", " twist"),
            ("Question: open a jar\nAnswer:", " throw it"),
        ],
        1,
    ),
    (
        "boolq",
        {"question": "is it so", "title": "So", "answer": True, "passage": "It is."},
        [
            ("It is.\nQuestion: is it so?\nAnswer:", " no"),
            ("It is.\nQuestion: is it so?\nAnswer:", " yes"),
        ],
        1,
    ),
    (
        "boolq",
        {"question": "is it so?", "label": 0, "passage": "It is."},
        [
            ("It is.\nQuestion: is it so?\nAnswer:", " no"),
            ("It is.\nQuestion: is it so?\nAnswer:", " yes"),
        ],
        0,
    ),
    (
        "winogrande",
        {"sentence": "Ann sold Bea _ was glad.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        [("Ann sold Bea Ann", " was glad."), ("Ann sold Bea Bea", " was glad.")],
        1,
    ),
    (
        "arc_easy",
        {
            "id": "1",
            "question": {
                "stem": "What burns?",
                "choices": [{"text": "wood", "label": "A"}, {"text": "stone", "label": "B"}],
            },
            "answerKey": "B",
        },
        [("Question: What burns?\nAnswer:", " wood"), ("Question: What burns?\nAnswer:", " stone")],
        1,
    ),
    (
        "arc_challenge",
        {
            "question": "What burns?",
            "choices": {"text": ["wood", "stone", "ice"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
        [("Question: What burns?\nAnswer:", f" {word}") for word in ("wood", "stone", "ice")],
        0,
    ),
    (
        "hellaswag",
        {
            "activity_label": "Rowing",
            "ctx_a": "A man sits [substeps] in a boat.",
            "ctx_b": "he",
            "endings": ["rows away.", "[title] Flies  off.", "sleeps.", "sinks."],
            "label": "2",
        },
        [
            ("Rowing: A man sits in a boat. He", f" {end}")
            for end in (
                "rows away.",
                " Flies off.",
                "sleeps.",
                "sinks.",
            )  # spaces as in the harness
        ],
        2,
    ),
]


@pytest.mark.parametrize(("task", "record", "pairs", "gold"), ORIGINALS)
def test_original_formats(task, record, pairs, gold, tmp_path):
    """In JSONL and in parquet."""
    item = FORMATS[task](record)
    assert item == Item(tuple(pairs), gold)
    (tmp_path / f"{task}.jsonl").write_text(json.dumps(record) + "\n")
    assert read_task(task, str(tmp_path)).items == [(1, item)]
    (tmp_path / f"{task}.jsonl").unlink()
    table = pyarrow.Table.from_pylist([record, record])
    pyarrow.parquet.write_table(table, tmp_path / f"{task}-00000-of-00001.parquet")
    assert read_task(task, str(tmp_path)).items == [(1, item), (2, item)]


@pytest.mark.parametrize("task", ["boolq", "lambada", "piqa", "winogrande"])
def test_the_simple_format(task):
    file = read_task(task, str(FOLDER))
    records = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert not file.malformed
    for (_, item), record in zip(file.items, records, strict=True):
        if task == "lambada":
            assert item.pairs == ((record["Query"], record["label"]),)
        elif task == "winogrande":
            assert item.pairs == tuple((choice, record["Query"]) for choice in record["Choices"])
            assert item.gold == int(record["label"]) - 1
        else:
            assert item.pairs == tuple((record["Query"], choice) for choice in record["Choices"])
            assert item.gold == record["label"]


def test_labels_of_piqa_in_a_separate_file(tmp_path):
    record = {"goal": "g", "sol1": "a", "sol2": "b"}
    (tmp_path / "piqa_valid.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    (tmp_path / "piqa_valid-labels.lst").write_text("1\n0\n")
    assert [item.gold for _, item in read_task("piqa", str(tmp_path)).items] == [1, 0]
    (tmp_path / "piqa_valid-labels.lst").write_text("1\n")
    with pytest.raises(ValueError, match=r"each of the 2 records of piqa_valid.jsonl; it has 1"):
        read_task("piqa", str(tmp_path))


@pytest.mark.parametrize(
    ("task", "record", "reason"),
    [
        ("piqa", {"goal": "g", "sol1": "a"}, "'sol2' is missing"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b"}, "'label' is missing"),
        (
            "piqa",
            {"goal": "g", "sol1": "a", "sol2": "b", "label": 2},
            "label must be one of 0, 1; got 2",
        ),
        (
            "piqa",
            {"goal": "g", "sol1": "a", "sol2": "b", "label": True},
            "label must be .*; got True",
        ),
        (
            "piqa",
            {"Query": "q", "Choices": ["a"], "label": 0},
            r"choices must be 2 texts; got \['a'\]",
        ),
        # Two questions on one text, merged into one.
        (
            "winogrande",
            {"Query": " w.", "Choices": ["a A", "a B", "b A", "b B"], "label": "2"},
            "number of choices must be 2; got 4",
        ),
        (
            "piqa",
            {"Query": "q", "Choices": ["a", 3], "label": 0},
            "a choice must be a non-empty text; got 3",
        ),
        ("piqa", [1], r"the record must be an object; got \[1\]"),
        (
            "winogrande",
            {"sentence": "no blank", "answer": "1"},
            "must have a '_' and text after it",
        ),
        ("arc_easy", {"question": {"stem": "s", "choices": 3}}, "the choices must be .*; got 3"),
        ("arc_easy", {"question": "s", "choices": []}, r"the choices must be .*; got \[\]"),
        ("arc_easy", {"question": "s", "choices": {"text": None, "label": []}}, "texts; got None"),
        ("arc_easy", {"question": "s", "choices": {"text": ["a", "b"]}}, "labels must be .* None"),
        ("hellaswag", {"ctx_a": "a", "activity_label": "b", "endings": None}, "4 texts; got None"),
        ("hellaswag", {"ctx_a": "a", "activity_label": "b", "endings": "abcd"}, "got 'abcd'"),
        ("lambada", {"text": "word"}, "must have at least two words"),
        ("lambada", {"text": None}, "'text' must be a non-empty text; got None"),
    ],
)
def test_malformed_records_are_counted_and_left_out(task, record, reason, tmp_path):
    good = next(each for name, each, *_ in ORIGINALS if name == task)
    lines = [json.dumps(good), json.dumps(record), "{", b"\xff".decode("latin1"), json.dumps(good)]
    (tmp_path / f"{task}.jsonl").write_bytes("\n".join(lines).encode("latin1"))
    file = read_task(task, str(tmp_path))
    assert [number for number, _ in file.items] == [1, 5]
    assert [each.number for each in file.malformed] == [2, 3, 4]
    assert re.search(reason, file.malformed[0].reason)
    assert file.malformed[1].reason.startswith("the record is not JSON")


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be one of lambada, piqa.*; got 'piqs'"):
        find_file("piqs", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--task_dir must be the folder of the task files"):
        find_file("piqa", str(tmp_path / "nowhere"))
    (tmp_path / "boolq.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match=r"must have a file piqa.* has boolq.jsonl"):
        find_file("piqa", str(tmp_path))
    with pytest.raises(ValueError, match="must have well-formed records of boolq; it is empty"):
        read_task("boolq", str(tmp_path))
    (tmp_path / "boolq-2.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(
        ValueError, match=r"one file for the task boolq; .* has boolq-2.parquet, boolq.jsonl"
    ):
        find_file("boolq", str(tmp_path))
    (tmp_path / "boolq.jsonl").unlink()
    with pytest.raises(ValueError, match="must be a parquet file"):
        read_task("boolq", str(tmp_path))
    (tmp_path / "piqa.jsonl").write_text("[" * 100_000)
    with pytest.raises(
        ValueError, match="in the first, the record is not JSON: it is nested too deeply"
    ):
        read_task("piqa", str(tmp_path))
    (tmp_path / "piqa-labels.lst").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"piqa-labels\.lst' must be UTF-8 text"):
        read_task("piqa", str(tmp_path))
    (tmp_path / "ARC-Easy-test.jsonl").write_text("{}")
    assert find_file("arc_easy", str(tmp_path)).name == "ARC-Easy-test.jsonl"


def test_names_of_tasks():
    assert parse_tasks("piqa, boolq") == ("piqa", "boolq")
    with pytest.raises(ValueError, match=r"names from lambada, piqa, boolq, .*; got 'pica'"):
        parse_tasks("piqa,pica")
    with pytest.raises(ValueError, match="--tasks must have each name once"):
        parse_tasks("piqa,piqa")


def test_results_of_known_scores():
    """The second question's longer choice is only right per character."""
    items = [
        Item((("q", " ab"), ("q", " cd")), 0),
        Item((("q", " a"), ("q", " abcd")), 1),
        Item((("q", " a"), ("q", " b"), ("q", " c"), ("q", " d")), 2),
    ]
    values = [-1, -2, -1, -2, -3, -3, -4, -5]
    scores = [Score(float(value), False, value == -5) for value in values]
    result = summarize("piqa", items, scores, [MalformedRecord(2, "why")])
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["accuracy_norm"] == pytest.approx(2 / 3)
    assert result["accuracy_stderr"] == pytest.approx(math.sqrt((1 / 3) * (2 / 3) / 2))
    assert result["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert (result["n"], result["truncated"], result["malformed"]) == (3, 1, 1)
    assert result["malformed_records"] == ["2: why"]

    words = [Item((("a", " b"),), 0), Item((("a", " c"),), 0)]
    lambada = summarize("lambada", words, [Score(-1.0, True, False), Score(-3.0, False, False)], [])
    assert lambada["accuracy"] == 0.5
    assert lambada["perplexity"] == pytest.approx(math.exp(2))
    assert lambada["perplexity_stderr"] == pytest.approx(math.exp(2))
    assert "accuracy_norm" not in lambada
    text = table({"piqa": result, "lambada": lambada}).splitlines()
    assert "33.33 ± 33.33" in text[2]
    assert len({len(line) for line in text}) == 1


@pytest.mark.parametrize(
    ("continuations", "chosen"),
    [
        # Per character -1 and -0.9; with the space it would be -0.5 and -0.675.
        ((" a", " abc"), 1),
        # One space only, as in HellaSwag, whose ending " a" has two characters: -0.5 and -0.9.
        (("  a", " abc"), 0),
        # No space, as in the simple format of others: -0.5 and -0.54.
        (("ab", "abcde"), 0),
    ],
)
def test_the_space_before_a_choice_does_not_count_as_its_character(continuations, chosen):
    """As in the harness, which divides by the length of the choice without its delimiter."""
    item = Item(tuple(("q", continuation) for continuation in continuations), chosen)
    scores = [Score(-1.0, False, False), Score(-2.7, False, False)]
    result = summarize("piqa", [item], scores, [])
    assert result["accuracy_norm"] == 1
    assert result["accuracy"] == (chosen == 0)


def test_all_tasks_in_a_folder():
    config = small_config("fai_split", model={"context": 200}).model
    params = models.init(config, jax.random.key(np.random.default_rng().integers(2**31)))
    scorer = Scorer(config, params, make_mesh(MeshConfig(data=2), 4), 4)
    tasks = ("boolq", "lambada", "piqa", "winogrande")
    results = evaluate_tasks(scorer, load_tokenizer("bytes"), tasks, str(FOLDER))
    assert list(results) == list(tasks)
    for result in results.values():
        assert result["n"] == 6
        assert 0 <= result["accuracy"] <= 1
    assert results["lambada"]["perplexity"] > 1
    assert set(tasks) < set(TASKS)
