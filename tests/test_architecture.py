"""Imports between packages follow the layers of docs/architecture.md."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# A package or a top-level module may import from its own row and from the rows below.
ROWS = [
    ["commands"],
    ["bench", "aot", "compare"],
    ["training"],
    ["evaluation", "interop"],
    ["checkpoints"],
    ["flops", "recipes"],
    ["config"],
    ["models"],
    ["layers", "data", "parallel"],
    ["report"],
    ["split", "kernels"],
    ["storage"],
    ["utils"],
]
RANK = {package: len(ROWS) - row for row, packages in enumerate(ROWS) for package in packages}


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
    not_imported_first = {
        # Triton compiles the functions of this module; the backend imports it on its first call.
        ROOT / "kernels/selective_scan/triton_kernels.py",
        # Exports contain this file, and only transformers imports it.
        ROOT / "flowhn_jax/interop/modeling_flowhn.py",
    }
    for path, _ in our_files():
        if path in not_imported_first:
            continue
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not optional & {name.split(".")[0] for name in names}, path
