"""Wording: no tracked text uses the expressions below in the sense that has a plainer word."""

import pathlib
import re
import subprocess
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent

_GAP = r"(?:[\s_]|#)+"  # between words: spaces, a line break in a comment, or _ in an identifier
_RATE = (
    r"(?:tokens|sequences|seconds|ms|M?FLOPs|[GT]?FLOP/s|[MG]iB|bytes|rows|windows|products|sums?)"
    r" an? (?:step|token|chip|device|second|branch|block|row|warp|core|sequence|head|process|turn)"
)
# Pattern -> what to write instead. A space stands for any gap between words, and each pattern
# matches whole words only, those of an identifier included.
WORDS = {
    "behind": "after, resulting, following",
    "anew": "again, from scratch",
    "accepted (?:is|are)": "KEY must be ...; got ...",
    "told": "is logged, is reported, raises ValueError; description",
    "(?:says?|said|saying) so": "is logged, is reported",
    "without a word": "silently",
    "spoilt": "malformed",
    "cut texts?": "truncated text",
    "in turns": "alternating, round-robin, in a ring buffer",
    "(?:takes?|taking) turns": "alternate",
    "rivals?": "baseline",
    "contestants?": "baseline",
    "so many": "n, this number of",
    "(?:go|goes|going|went|gone) on": "continue, resume",
    "beside": "next to, alongside",
    "used up": "is donated",
    "none sees": "documents never attend to each other",
    "(?:is|are) not here": "absent",
    "as (?:it is|they are) here": "available locally",
    "rooms": "packages, modules",
    "seams?": "patch point",
    _RATE: "per step, per token, per device",
    "(?:through_blocks|only_where|without_steps|of_first|settled)": "the names of the style guide",
}
# File -> fragments of lines in which an expression is meant literally.
ALLOWED: dict[str, tuple[str, ...]] = {
    "CHANGELOG.md": ("`flowhn_jax.compare.run`, `contestants`",),  # a name of before
}


class Text(NamedTuple):
    """A tracked file: its path in the repository and its content."""

    path: str
    content: str

    def line_at(self, offset):
        """Return number and text of the line at an offset."""
        number = self.content.count("\n", 0, offset) + 1
        return number, self.content.splitlines()[number - 1].strip()


def tracked_texts():
    names = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.ipynb"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    own = pathlib.Path(__file__).relative_to(ROOT).as_posix()
    return [
        Text(name, (ROOT / name).read_text())
        for name in names
        if name != own and (ROOT / name).is_file()
    ]


@pytest.fixture(scope="module")
def texts():
    if not (ROOT / ".git").exists():
        pytest.skip("lists the files that git tracks")
    return tracked_texts()


def pattern_of(word):
    letters = r"(?<![A-Za-z]){}(?![A-Za-z])"
    return re.compile(letters.format(word.replace(" ", _GAP)), re.IGNORECASE)


def uses(word, text):
    """Yield `path:line: the line` for each use of the word that is not allowed."""
    for found in pattern_of(word).finditer(text.content):
        number, line = text.line_at(found.start())
        if not any(fragment in line for fragment in ALLOWED.get(text.path, ())):
            yield f"{text.path}:{number}: {line}"


@pytest.mark.parametrize(("word", "instead"), WORDS.items(), ids=list(WORDS))
def test_plain_words(texts, word, instead):
    found = [use for text in texts for use in uses(word, text)]
    if found:
        pytest.fail("\n".join([f"instead of {word!r} write: {instead}", *found]), pytrace=False)


def test_every_allowed_line_is_there(texts):
    contents = {text.path: text.content for text in texts}
    for path, fragments in ALLOWED.items():
        for fragment in fragments:
            assert fragment in contents.get(path, ""), f"{path} has no line with {fragment!r}"


@pytest.mark.parametrize(
    ("word", "content", "line"),
    [
        ("behind", "# The state\n# Behind a step.", 2),
        ("behind", "def _behind_meta(self):", 1),
        ("without a word", "# It is lost without a\n    # word.", 1),
        ("(?:go|goes|going|went|gone) on", "def test_a_run_goes_on():", 1),
        (_RATE, "12 tokens a step", 1),
    ],
)
def test_a_use_is_found(word, content, line):
    (found,) = uses(word, Text("a.md", content))
    assert found.startswith(f"a.md:{line}: ")


@pytest.mark.parametrize("content", ["behindhand", "Besides, it works.", "tokens per step"])
def test_other_words_are_fine(content):
    assert not [use for word in WORDS for use in uses(word, Text("a.md", content))]
