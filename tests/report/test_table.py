import json
import math

from flowhn_jax.report.table import print_result


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
