"""Who may import whom (docs/architecture.md)."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# Each room may import rooms of its own row and of rows below it.
ROWS = [
    ["bench", "aot", "compare", "testing"],
    ["training", "evaluation", "report", "interop"],
    ["flops"],
    ["models", "data", "parallel"],
    ["layers"],
    ["config"],
    [
        "split",
        "kernels",
        "typed",
        "json_text",
        "whole_file",
        "folder_lock",
        "host_memory",
        "timing",
    ],
    ["messages", "limits"],
]
RANK = {room: len(ROWS) - row for row, rooms in enumerate(ROWS) for room in rooms}
MAINS = {"cli", "__main__"}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module):
    parts = module.split(".")
    if parts[0] == "kernels":
        return "kernels"
    return parts[1] if parts[0] == "flowhn_jax" and len(parts) > 1 else None


def our_files():
    for folder in ("flowhn_jax", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if path.stem not in MAINS and module != "flowhn_jax.__init__":
                yield path, room_of(module)


def test_imports_flow_downwards():
    files = list(our_files())
    assert len(files) > 20
    for path, room in files:
        for module in imported_modules(path):
            imported = room_of(module)
            if imported is not None:
                assert RANK[imported] <= RANK[room], f"{path} ({room}) imports {module}"


def test_kernels_and_split_know_nothing_of_flax():
    for path, room in our_files():
        if room in ("kernels", "split"):
            assert not any(name.startswith("flax") for name in imported_modules(path)), path


def test_optional_packages_are_imported_lazily():
    optional = {"torch", "transformers", "datasets", "matplotlib", "libtpu", "jax_triton", "triton"}
    # Triton compiles the functions of a module; the backend imports this one when it runs.
    triton_only = ROOT / "kernels/selective_scan/triton_kernels.py"
    for path, _ in our_files():
        if path == triton_only:
            continue
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not optional & {name.split(".")[0] for name in names}, path
