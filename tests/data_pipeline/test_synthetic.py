import itertools
import json

import numpy as np
import pytest

from flowhn_jax.commands import synthetic as command
from flowhn_jax.data.synthetic import TASKS, associative, questions


@pytest.mark.parametrize("size", [32, 200, 5_000, 40_000])
@pytest.mark.parametrize("task", TASKS)
def test_a_question_has_the_requested_size_and_a_right_answer(task, size):
    for question in itertools.islice(questions(task, size, seed=3), 5):
        assert 0.7 * size - 12 < len(question.context) <= size + 8
        assert 0 <= question.depth <= 1
        asked = question.context.split()
        if task == "associative":
            names, digits = asked[:-1:2], asked[1::2]
            assert len(set(names)) == len(names) == len(digits)
            place = names.index(asked[-1])
            assert question.answer == f" {digits[place]}"
            assert question.depth == place / max(1, len(names) - 1)
        else:
            assert question.context.endswith("pass key")
            assert f"pass key{question.answer}." in question.context


def test_the_seed_determines_the_questions():
    first, again, other = (
        [each.context for each in itertools.islice(questions("needle", 99, seed), 4)]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) == 4


def test_every_depth_and_digit_occurs():
    rng = np.random.default_rng()
    asked = [associative(rng, 60) for _ in range(300)]
    assert {each.answer for each in asked} == {f" {digit}" for digit in range(10)}
    assert min(each.depth for each in asked) == 0
    assert max(each.depth for each in asked) == 1


def test_written_documents_alternate_between_the_tasks(tmp_path, capsys):
    out = tmp_path / "d.jsonl"
    command.run([f"--out={out}", "--documents=5", "--size=64"])
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert len(texts) == 5
    assert ["pass key" in text for text in texts] == [False, True, False, True, False]
    assert "Wrote 5 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=needl"], "must be among associative, needle; got 'needl'"),
        (["--size=3"], "--size must be from 32 to 16777216; got 3"),
        (["--documents=0"], "--documents must be from 1 to .*; got 0"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        command.run([f"--out={tmp_path / 'x.jsonl'}", *arguments])
    assert not list(tmp_path.iterdir())
