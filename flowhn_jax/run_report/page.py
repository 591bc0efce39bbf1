"""The page about runs: well-formed HTML that loads nothing."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from flowhn_jax import config as config_lib
from flowhn_jax.config import FlowHNConfig
from flowhn_jax.report.svg import key
from flowhn_jax.run_report.figures import figures
from flowhn_jax.run_report.record import BITS, Record, flat_config, read_records
from flowhn_jax.run_report.style import STYLE
from flowhn_jax.storage import place
from flowhn_jax.utils.progress import clock
from flowhn_jax.utils.text import short_repr

_UNREAD = "\N{EN DASH}"  # in place of a key that the run's model does not have
# What XML, and with it well-formed HTML, cannot hold.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def write(workdirs: Sequence[str], out: str) -> None:
    """Write the page about the runs in these folders.

    Raises:
      FileNotFoundError: one is not the folder of a run.
      ValueError: a file in one is damaged, or a folder is given twice.
    """
    place(out).write(page(read_records(workdirs)))


def page(records: Sequence[Record]) -> str:
    """Return the page about runs."""
    title = records[0].name if len(records) == 1 else f"{len(records)} runs"
    sections = [
        _section("Summary", _scrolling(_summary(records))),
        _section("Curves", f'<div class="figures">{"".join(figures(records))}</div>')
        if any(record.rows for record in records)
        else _section("Curves", "<p>No rows yet.</p>"),
        *_configs(records),
        *_samples(records),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"/>',
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
            f"<title>{_text(title)}: FlowHN</title>",
            f"<style>{STYLE}</style></head><body><main>",
            f"<h1>{_text(title)}</h1>",
            *sections,
            "</main></body></html>\n",
        ]
    )


def _text(value: Any) -> str:
    """Return a value as HTML text."""
    return html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _scrolling(table: str) -> str:
    return f'<div class="scrolling">{table}</div>'


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of cells that are HTML already, the first of each row a heading."""
    head = "".join(f'<th scope="col">{each}</th>' for each in headings)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _summary(records: Sequence[Record]) -> str:
    headings = ("run", "model", "parameters", "steps", "tokens", "time in steps", "training loss",
                "bits/byte, last", "bits/byte, best", "tokens/s", "MFU")  # fmt: skip
    return _table(headings, map(_summary_row, enumerate(records)))


def _summary_row(numbered: tuple[int, Record]) -> list[str]:
    style, record = numbered
    train, model = record.config.train, record.config.model
    step = record.rows[-1]["step"] if record.rows else 0
    best, mfu = record.best(), record.median("mfu")
    name = model.split.strategy if isinstance(model, FlowHNConfig) else model.kind
    cells = [
        name,
        f"{record.parameters:,}",
        f"{step:,}" if step == train.steps else f"{step:,} of {train.steps:,}",
        _number(record.last("tokens"), 0),
        clock(record.seconds()),
        _number(record.last("loss"), 4),
        _number(record.last(BITS), 4),
        "n/a" if best is None else f"{best[0]:.4f} (step {best[1]:,})",
        _number(record.median("tokens_per_second"), 0),
        "n/a" if mfu is None else f"{100 * mfu:.1f} %",
    ]
    return [key(style) + _text(record.name), *map(_text, cells)]


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:,.{digits}f}"


def _configs(records: Sequence[Record]) -> list[str]:
    """Return the sections about the configs: where runs differ, and what is not the default."""
    configs = [flat_config(record.config) for record in records]
    defaults = config_lib.flat(config_lib.to_dict(config_lib.parse({})))
    names = list(dict.fromkeys(name for each in configs for name in each))
    differing, common = [], []
    for name in names:
        values = [each.get(name, _UNREAD) for each in configs]
        known = [value for value in values if value != _UNREAD]
        is_default = known[0] == defaults[name]
        is_in_all = len(known) == len(values)
        if any(value != known[0] for value in known) or not (is_default or is_in_all):
            differing.append([name, *map(_value, values)])
        elif not is_default:
            common.append([name, _value(known[0]), _value(defaults[name])])
    sections = []
    if differing:
        headings = ["key", *(_text(record.name) for record in records)]
        table = _table(headings, differing)
        sections.append(_section("Config, where the runs differ", _scrolling(table)))
    if common:
        title = "Config, other than the defaults" + (" in all runs" if len(records) > 1 else "")
        table = _table(("key", "value", "default"), common)
        sections.append(_section(title, _scrolling(table)))
    return sections


def _value(value: Any) -> str:
    return _text(value if isinstance(value, str) and value else short_repr(value))


def _samples(records: Sequence[Record]) -> list[str]:
    """Return the section with the texts that the models generated, if there are any."""
    found = [
        f"<h3>{_text(record.name)}, step {record.sample.step:,}</h3>"
        f"<pre><em>{_text(record.sample.prompt)}</em>{_text(record.sample.text)}</pre>"
        for record in records
        if record.sample is not None
    ]
    if not found:
        return []
    about = "<p>The prompt, in italics, is the beginning of the validation set.</p>"
    return [_section("Samples", about + "".join(found))]
