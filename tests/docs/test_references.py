"""Every link, path and module that the documentation names exists."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"\b(?:flowhn_jax|kernels|configs|tests|tools|docs)/[\w./-]*\w")
MODULE = re.compile(r"python -m ((?:flowhn_jax|tools)[\w.]*)")
PLACEHOLDERS = ("configs/baseline_SIZE.py", "configs/flowhn_SIZE.py")
# A how-to page creates these files, and the changelog names modules that were renamed.
NOT_CHECKED = ("how-to", "CHANGELOG.md")


def each_page(pattern, *, all_pages=False):
    """Yield (page, match) for every match of a pattern."""
    for page in PAGES:
        if all_pages or not any(part in page.parts for part in NOT_CHECKED):
            for found in pattern.finditer(page.read_text()):
                yield page, found


def anchors_of(page):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    missing = []
    for page, found in each_page(LINK, all_pages=True):
        target, _, anchor = found[1].partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            missing.append(f"{page.relative_to(ROOT)}: {found[1]}")
    assert not missing, "\n".join(missing)


def test_paths_exist():
    missing = [
        f"{page.relative_to(ROOT)}: {found[0]}"
        for page, found in each_page(PATH)
        if found[0] not in PLACEHOLDERS and not (ROOT / found[0]).exists()
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(
    "module", sorted({found[1] for _, found in each_page(MODULE, all_pages=True)})
)
def test_commands_exist(module):
    assert importlib.util.find_spec(module) is not None
    is_package = importlib.util.find_spec(module).submodule_search_locations
    assert not is_package or importlib.util.find_spec(f"{module}.__main__") is not None
