"""Imports between packages follow the layers of docs/architecture.md."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A package or a top-level module may import from its own row and from the rows below.
ROWS = [
    ["commands"],
    ["bench", "aot", "compare", "sweep", "run_report"],
    ["training"],
    ["evaluation", "interop"],
    ["checkpoints"],
    ["flops", "recipes"],
    ["config"],
    ["models", "train_config"],
    ["layers", "data", "parallel"],
    ["report"],
    ["split", "kernels"],
    ["storage"],
    ["utils"],
]
RANK = {package: len(ROWS) - row for row, packages in enumerate(ROWS) for package in packages}

# Modules outside flowhn_jax/storage and flowhn_jax/utils that open local files, and why their paths
# are never those of a bucket.
LOCAL_FILES = {
    "aot/roofline/pallas_schedule.py": "temporary files of the TPU compiler",
    "aot/step_plan.py": "temporary files of the TPU compiler",
    "bench/branch_parallel.py": "the threads that the system lists",
    "bench/output.py": "tests with the system whether a local --out can be written",
    "bench/source_lines.py": "names of source files",
    "bench/step_profile.py": "the profiler's temporary folder",
    "bench/suite/": "its processes share a local folder; --out is refused if it is in a bucket",
    "checkpoints/free_space.py": "the space that is left on a disk",
    "commands/help_text.py": "the width of the terminal",
    "commands/runner.py": "names of source files, and the null device",
    "data/corpus.py": "the standard library's sources",
    "data/packages_corpus.py": "the sources of installed packages",
    "data/prepare/": "a set is built in a local folder and uploaded",
    "data/prepared.py": "the folder of the local copies",
    "data/shard_cache.py": "the local copies of a bucket's shards",
    "data/shards.py": "ArrayRecord writes local files",
    "data/source_files.py": "walks local folders; those in a bucket are listed by storage",
    "data/staging.py": "a set is built in a local folder",
    "interop/huggingface.py": "checks that a name in an index has no folders",
    "recipes.py": "recipes are Python files",
    "training/bucket_metrics.py": "TensorBoard's file before its upload",
    "training/events.py": "tensorboardX writes local files",
    "training/metrics.py": "appends rows, which a bucket cannot; see bucket_metrics.py",
    "training/profiler.py": "the profiler's temporary folder",
    "training/summary.py": "the picture before its upload, and the name of the program",
}
FILE_CALLS = {"listdir", "makedirs", "open", "path", "remove", "rename", "replace", "stat"}
FILE_CALLS |= {"truncate", "unlink", "walk"}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module):
    """Return the package or top-level module of a dotted name, or None for other projects."""
    parts = module.split(".")
    if parts[0] == "kernels":
        return "kernels"
    if parts[0] != "flowhn_jax":
        return None
    # flowhn_jax/__init__.py and every __main__.py count as commands.
    return "commands" if len(parts) == 1 or "__main__" in parts else parts[1]


def our_files():
    for folder in ("flowhn_jax", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(parts).removesuffix(".__init__")
            yield path, package_of(module)


def test_imports_go_downwards():
    files = list(our_files())
    assert len(files) > 20
    upward = [
        f"{path.relative_to(ROOT)} ({package}) imports {module}"
        for path, package in files
        for module in imported_modules(path)
        if (imported := package_of(module)) and RANK[imported] > RANK[package]
    ]
    assert not upward, "\n".join(upward)


def test_nobody_imports_a_command_or_a_recipe():
    """Only the entry points import commands; nobody imports recipes, tools or tests."""
    for path, package in our_files():
        for module in imported_modules(path):
            assert module.split(".")[0] not in ("configs", "tools", "tests"), path
            is_main = path.stem == "__main__" or package == "commands"
            assert is_main or package_of(module) != "commands" or module == "flowhn_jax", path


def test_kernels_and_split_do_not_import_flax():
    for path, package in our_files():
        if package in ("kernels", "split"):
            assert not any(name.startswith("flax") for name in imported_modules(path)), path


def test_optional_packages_are_imported_lazily():
    optional = {"torch", "transformers", "datasets", "matplotlib", "libtpu", "jax_triton", "triton"}
    optional |= {"wandb", "trackio"}
    # Triton compiles the functions of the first; the backends import them on their first call.
    # Exports contain the second, and only transformers imports it.
    imported_later = ("triton_kernels.py", "modeling_flowhn.py")
    for path, _ in our_files():
        if path.name in imported_later:
            continue
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not optional & {name.split(".")[0] for name in names}, path


def _opens_local_files(path):
    """Return whether a module imports pathlib or shutil, or opens files with open or os."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names) if {"pathlib", "shutil"} & {alias.name for alias in names}:
                return True
            case ast.Call(func=ast.Name("open")):
                return True
            case ast.Attribute(value=ast.Name("os"), attr=name) if name in FILE_CALLS:
                return True
    return False


def test_paths_that_may_be_in_a_bucket_are_left_to_storage():
    package = ROOT / "flowhn_jax"
    found = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] not in ("storage", "utils")
        and _opens_local_files(path)
    ]
    unknown = [name for name in found if not name.startswith(tuple(LOCAL_FILES))]
    assert not unknown, f"{unknown}: use flowhn_jax.storage, or give a reason in LOCAL_FILES"
    for name in LOCAL_FILES:
        assert any(each.startswith(name) for each in found), f"{name} opens no local files"


# Runs train.py up to its first call of an attention kernel, and prints the calls that lead to it.
_TRAIN_TO_ATTENTION = """
import os, runpy, sys, traceback
from flowhn_jax.layers import attention

def attention_kernel(*arguments, **options):
    for frame in traceback.extract_stack()[:-1]:
        print("calls", frame.filename, frame.name, flush=True)
    os._exit(0)

attention.attention = attention_kernel
runpy.run_path("train.py", run_name="__main__")
"""


def test_path_from_train_to_an_attention_kernel_is_short(tmp_path):
    """At most 12 calls in 9 files: docs/architecture.md names them for new readers."""
    flags = ["--config=configs/flowhn_tiny.py", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", _TRAIN_TO_ATTENTION, *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    calls = []
    for line in run.stdout.splitlines():
        path = (ROOT / line.removeprefix("calls ").rsplit(" ", 1)[0]).resolve()
        if line.startswith("calls ") and path.is_relative_to(ROOT):
            calls.append(path.relative_to(ROOT).as_posix())
    calls = [file for file in calls if file.startswith(("train.py", "flowhn_jax/", "kernels/"))]
    assert calls, run.stdout + run.stderr
    assert (calls[0], calls[-1]) == ("train.py", "flowhn_jax/layers/attention.py")
    assert len(calls) <= 12, calls
    assert len({*calls, "kernels/attention/__init__.py"}) <= 9, calls
