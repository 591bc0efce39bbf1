import json
import math

from flowhn_jax.report.table import markdown, print_result, text_table, to_json


def test_last_line_is_strict_json(capsys):
    print_result({"nll": 1.5, "perplexity": math.inf, "tokens": 12345, "mfu": None, "device": "x"})
    *table, line = capsys.readouterr().out.splitlines()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse) == {
        "nll": 1.5,
        "perplexity": None,
        "tokens": 12345,
        "mfu": None,
        "device": "x",
    }
    assert "12,345" in table[2]
    assert "n/a" in table[3]


def test_numbers_that_are_not_finite_become_null_at_any_depth():
    assert json.loads(to_json({"rows": [{"a": math.nan, "b": [1, math.inf]}]})) == {
        "rows": [{"a": None, "b": [1, None]}]
    }


def test_markdown():
    assert markdown(["model", "tokens/s"], [["a", "1,234"], ["longer", "5"]]).splitlines() == [
        "| model  | tokens/s |",
        "| ------ | -------: |",
        "| a      |    1,234 |",
        "| longer |        5 |",
    ]


def test_a_narrow_column_has_a_rule_that_is_one():
    """Markdown wants a dash in it, and a heading may be empty."""
    rule = markdown(["n", "", "x"], [["1", "2", "3"]]).splitlines()[1]
    cells = [cell.strip() for cell in rule.strip("|").split("|")]
    assert cells == ["---", "--:", "--:"]


def test_text_table_aligns_columns_and_splits_headings():
    rows = [["a", "1,234", "yes"], ["longer", "5", "no"]]
    assert text_table(["name", "speed\ntokens/s", "fits"], rows, left=(0, 2)).splitlines() == [
        "name       speed  fits",
        "        tokens/s",
        "a          1,234  yes",
        "longer         5  no",
    ]
