import itertools
import json

import numpy as np
import pytest

from flowhn_jax.data.synthetic import TASKS, associative, main, questions


@pytest.mark.parametrize("size", [32, 200, 5_000, 40_000])
@pytest.mark.parametrize("task", TASKS)
def test_questions_have_their_size_and_their_answer(task, size):
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


def test_a_seed_gives_the_same_and_others_do_not():
    first, again, other = (
        [each.context for each in itertools.islice(questions("needle", 99, seed), 4)]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) == 4


def test_all_depths_and_digits_are_asked():
    rng = np.random.default_rng()
    asked = [associative(rng, 60) for _ in range(300)]
    assert {each.answer for each in asked} == {f" {digit}" for digit in range(10)}
    assert min(each.depth for each in asked) == 0
    assert max(each.depth for each in asked) == 1


def test_documents(tmp_path, capsys):
    out = tmp_path / "d.jsonl"
    main([f"--out={out}", "--documents=5", "--size=64"])
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert len(texts) == 5
    assert ["pass key" in text for text in texts] == [False, True, False, True, False]
    assert "wrote 5 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=needl"], "'needl'; accepted are associative, needle"),
        (["--size=3"], "--size is 3; accepted is 32 to 16777216"),
        (["--documents=0"], "--documents is 0"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([f"--out={tmp_path / 'x.jsonl'}", *arguments])
    assert not list(tmp_path.iterdir())
