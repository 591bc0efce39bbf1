"""The packages corpus: the sources and texts of the packages that are installed in this Python.

It needs no download, and is often hundreds of megabytes. Files are taken in the order of hashes of
their content, so that any part of the corpus is a sample of all packages.
"""

import hashlib
import os
import pathlib
import sysconfig

_SUFFIXES = (".md", ".py", ".pyi", ".rst", ".txt")
_MAX_FILE_BYTES = 1 << 20  # larger ones are mostly tables of data
_MAX_BYTES = 1 << 27


def package_documents(max_bytes: int = _MAX_BYTES) -> dict[str, bytes]:
    """Return the corpus: different UTF-8 texts by the names of their files, at most `max_bytes`.

    Raises:
      FileNotFoundError: no packages are installed.
    """
    found: dict[str, tuple[str, bytes]] = {}  # by hash; of equal files the first name counts
    for root in sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")}):
        for path in _paths(root):
            text = path.read_bytes()
            if text and _is_utf8(text):
                name = path.relative_to(root).as_posix()
                found.setdefault(hashlib.sha256(text).hexdigest(), (name, text))
    documents, size = {}, 0
    for _, (name, text) in sorted(found.items()):
        if size + len(text) > max_bytes:
            break
        documents[name] = text
        size += len(text)
    if not documents:
        raise FileNotFoundError(
            "The packages corpus consists of the sources of installed packages, but there are none "
            f"in {sysconfig.get_path('purelib')}; prepare another --source."
        )
    return documents


def _paths(root: str) -> list[pathlib.Path]:
    """Return the files that the corpus may be made of, sorted."""
    found = []
    for folder, children, names in os.walk(root):
        children[:] = (child for child in children if child != "__pycache__")
        paths = (pathlib.Path(folder, name) for name in names if name.endswith(_SUFFIXES))
        found += [each for each in paths if each.is_file() and _is_small(each)]
    return sorted(found)


def _is_small(path: pathlib.Path) -> bool:
    return path.stat().st_size <= _MAX_FILE_BYTES


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
