"""pyproject.toml, the requirements files and the Dockerfile say the same."""

import re
import tomllib

import flowhn_jax
from tests.command_line import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(name):
    """Return the requirements of a file, and the files that it includes."""
    lines = (ROOT / name).read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    included = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    return [line for line in lines if not line.startswith("-r ")], included


def test_the_requirements_files_are_those_of_pyproject():
    assert requirements("requirements.txt") == (PROJECT["dependencies"], [])
    for extra, base in (("gpu", ""), ("tpu", ""), ("gcs", ""), ("test", "-gcs"), ("aot", "-test")):
        included = [f"requirements{base}.txt"]
        assert requirements(f"requirements-{extra}.txt") == (EXTRAS[extra], included)


def test_there_is_one_version():
    assert "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+", flowhn_jax.__version__)


def test_the_packages_are_typed():
    for package in ("flowhn_jax", "kernels"):
        assert (ROOT / package / "py.typed").is_file()


def test_the_dockerfile_names_what_exists():
    text = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert names
    for name in names:
        assert list(ROOT.glob(name)), name
    accelerators = re.search(r"ACCELERATOR=(\w+)", text)
    assert accelerators is not None
    assert accelerators[1] in ("cpu", *EXTRAS)
    for extra in re.findall(r"\.\[(\w+)\]", text):
        assert extra in EXTRAS
    for name in re.findall(r"requirements[\w-]*\.txt", text):
        assert (ROOT / name).is_file()
