"""`bench suite`: measures what is missing in a folder, writes its files and reports."""

import math
import os
import pathlib
import sys
from collections.abc import Sequence

from flowhn_jax.bench.suite import figures, page
from flowhn_jax.bench.suite.document import Document, write
from flowhn_jax.bench.suite.parts import PARTS, Part
from flowhn_jax.bench.suite.supervisor import LOG, Supervisor
from flowhn_jax.utils.lock import try_lock
from flowhn_jax.utils.progress import Progress, log
from flowhn_jax.utils.text import short_path

PAGE = "suite.md"
_DESCRIBES = "flowhn_jax.bench.suite.machine"
_RED, _PLAIN = "\033[31;1m", "\033[0m"


def run_suite(
    out: str, minutes: float, parts: Sequence[Part] = PARTS, describes: str = _DESCRIBES
) -> bool:
    """Measure what is missing in a folder; return whether all results of the kernels are correct.

    suite.json, suite.md, suite.log and up to four PNG figures are written to the folder, the
    compilation cache and the text of the learning runs to its parent.

    Args:
      out: the folder. An interrupted suite is continued.
      minutes: maximum time to measure; the files are complete a few seconds later.
      parts: the parts of the suite.
      describes: module whose `describe()` identifies the machine.

    Raises:
      ValueError: another suite uses the folder, or its results are of other code or another
        machine.
      RuntimeError: the device cannot be used.
    """
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with try_lock(folder) as is_free:
        if not is_free:
            raise ValueError(
                f"--out must be a folder that no other suite uses; {short_path(out)} is in use by "
                "another suite. Wait for it, or give another --out."
            )
        document = Document.open(folder)
        document.save()  # so that a folder that cannot be written is found now
        seconds = math.ceil(60 * minutes)
        bar: Progress = Progress(seconds, "suite", "seconds")
        supervisor = Supervisor(
            parts,
            document,
            folder,
            seconds=60 * minutes,
            describes=describes,
            log=log,
            on_part=lambda: _write_page(folder, document, parts, ()),
            on_time=lambda passed: bar.move_to(min(round(passed), seconds)),
        )
        try:
            with bar:
                supervisor.run()
        finally:
            drawn = _draw(folder, document)
            _write_page(folder, document, parts, drawn)
    return _report(folder, document, parts, supervisor.stopped_by)


def _draw(folder: pathlib.Path, document: Document) -> list[str]:
    """Write the figures and return their names, none if matplotlib is not installed."""
    try:
        drawn = figures.draw(document.rows())
    except ImportError as error:
        print(f"no figures were drawn: {error}")
        return []
    for name, data in drawn.items():
        write(folder / name, data)
    return list(drawn)


def _write_page(
    folder: pathlib.Path, document: Document, parts: Sequence[Part], drawn: Sequence[str]
) -> None:
    write(folder / PAGE, page.render(document, parts, drawn).encode())


def _report(
    folder: pathlib.Path, document: Document, parts: Sequence[Part], stopped_by: str | None
) -> bool:
    """Print wrong numbers in red, what is missing, and where the results are."""
    wrong = page.wrong_rows(document.rows())
    red, plain = (
        (_RED, _PLAIN) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    )
    print()
    for row in wrong:
        print(
            f"{red}WRONG: {row['key']}: error {row['error']}, gradients {row['gradient_error']} "
            f"({row['worst_gradient']}), tolerance {row['tolerance']}{plain}"
        )
    if missing := page.missing_lines(document, parts):
        reason = f"Stopped by {stopped_by}" if stopped_by else "Time limit reached"
        print(f"{reason}. Missing:")
        print("\n".join(f"  {line}" for line in missing))
        print("Run the same command again to continue.")
    print(f"wrote {folder}/suite.json, {PAGE}, {LOG} and figures")
    return not wrong
