"""The embedded corpus: the sources and documentation that ship with the running CPython.

It is about 10 MB of real text that needs no download. Tests, codec tables, files that depend on the
machine, and installed packages are excluded.
"""

import ast
import hashlib
import os
import pathlib
import platform
import sysconfig

_SKIPPED_FOLDERS = (
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "site-packages",
    "test",
    "tests",
)
_SUFFIXES = (".html", ".py", ".rst", ".txt")
_TOPICS = "pydoc_data/topics.py"


def embedded_documents() -> dict[str, bytes]:
    """Return the corpus: UTF-8 texts by name, sorted by name; each is a file or a page of help().

    Raises:
      FileNotFoundError: this Python has no standard library on disk.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    documents = {}
    for path in _paths(root):
        name, text = path.relative_to(root).as_posix(), path.read_bytes()
        if name == _TOPICS:
            documents |= {f"{name}:{topic}": page for topic, page in _topics(text).items()}
        elif text:
            documents[name] = text
    if not documents:
        raise FileNotFoundError(
            "The embedded corpus consists of the sources of Python's standard library, but there "
            f"are none in {root}; prepare your own text and name it by --config.data.path."
        )
    return dict(sorted(documents.items()))


def describe(documents: dict[str, bytes], title: str = "embedded corpus") -> str:
    """Return one line that identifies a corpus by a hash of all its names and texts."""
    digest = hashlib.sha256()
    for name, text in documents.items():
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
    size = sum(map(len, documents.values()))
    return (
        f"{title} of Python {platform.python_version()}: {len(documents)} documents, "
        f"{size} bytes, sha256 {digest.hexdigest()}"
    )


def _paths(root: pathlib.Path) -> list[pathlib.Path]:
    """Return the files that the corpus is made of, sorted."""
    found = []
    for folder, children, names in os.walk(root):
        # config-* folders hold files of CPython's build, which depend on the machine.
        children[:] = (
            c for c in children if c not in _SKIPPED_FOLDERS and not c.startswith("config-")
        )
        found += [
            pathlib.Path(folder, name)
            for name in names
            if name.endswith(_SUFFIXES) and not name.startswith("_sysconfigdata")
        ]
    return sorted(found)


def _topics(source: bytes) -> dict[str, bytes]:
    """Return the pages of Python's help() from topics.py, which assigns them as one dict."""
    (assignment,) = (node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return {name: text.encode() for name, text in ast.literal_eval(assignment.value).items()}
