"""Source line and operation of each instruction in a compiled program's text (HLO)."""

import collections
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from flowhn_jax.aot import hlo
from flowhn_jax.utils.sources import ROOT

_PACKAGES = ("flowhn_jax/", "kernels/")
_LIBRARIES = re.compile(
    rf"/(site|dist)-packages/|^{re.escape(sysconfig.get_path('stdlib'))}/|^[^/]*<"
)
# These run other computations, whose instructions have their own costs.
_CALLING = ("call", "while", "conditional", "async-start")
_PRODUCTS = ("dot", "convolution")
_MOVES = re.compile(r"copy|bitcast|tuple|get-tuple-element|optimization-barrier|.*-(start|done)$")
_METADATA = re.compile(r'\bmetadata=\{((?:[^}"]|"(?:[^"\\]|\\.)*")*)\}')
_FIELD = re.compile(r'(\w+)=(?:"((?:[^"\\]|\\.)*)"|(\d+))')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
# An op_name that ends in one of these names no primitive: XLA added the instruction.
_SCOPES = ("body", "cond", "closed_call", "eval_jaxpr", "checkpoint")
# All projections call these: the caller's line identifies the projection.
_SHARED = ("flowhn_jax/layers/linear.py",)


class Origin(NamedTuple):
    """The source line and the operation that an instruction comes from."""

    source: str  # 'flowhn_jax/layers/mamba1.py:88'; empty if unknown
    operation: str  # 'forward/dot_general'; empty if unknown


class ProgramText:
    """Names, source lines and operations of a program's instructions."""

    def __init__(self, text: str):
        head = re.match(r"HloModule ([^\s,]+)", text)
        if head is None:
            raise ValueError(f"text must be a compiled program's as_text(); got {text[:40]!r}.")
        self.module = head[1]
        self.program = hlo.Program(text)
        self._computation = {
            name: computation
            for computation, instructions in self.program.computations.items()
            for name in instructions
        }
        self._of_kernel = {_kernel_name(name): name for name in self._computation}
        self._users: dict[str, dict[str, list[str]]] = {}  # by computation; filled on demand
        tables = _read_tables(text)
        self._files = tables["FileNames"]
        self._locations = tables["FileLocations"]
        self._frames = tables["StackFrames"]

    def find(self, module: str | None, names: Sequence[str]) -> str | None:
        """Return the name of the instruction; None if the program has no such instruction."""
        if module not in (None, self.module):
            return None
        found = [name for name in names if name in self._computation]
        found += filter(None, (self._of_kernel.get(_kernel_name(name)) for name in names))
        # The trace may attribute a CUDA graph's kernels to the call of the whole graph.
        found.sort(key=lambda name: self._instruction(name).opcode in _CALLING)
        return found[0] if found else None

    def origin(self, name: str | None) -> Origin:
        """Return the source line and operation of an instruction; empty ones for None.

        A fusion takes those of its largest matrix product; without one, those of its own metadata,
        else of its root's, else of most of its instructions. What XLA adds without metadata, mostly
        copies, takes the line of its user, else of its operand.
        """
        if name is None:
            return Origin("", "")
        instruction = self._instruction(name)
        fused = list(self._fused(instruction))
        for one in _principal(instruction, fused):
            origin = self._own_origin(one)
            if origin.source:
                return origin
        own_operation = (
            "op_name" in instruction.attributes and self._own_origin(instruction).operation
        )
        if origins := [origin for origin in map(self._own_origin, fused) if origin.source]:
            source, operation = collections.Counter(origins).most_common(1)[0][0]
            return Origin(source, own_operation or operation)
        root = self._own_origin(fused[-1] if fused else instruction)
        return Origin(self._source_of_neighbors(name), own_operation or root.operation)

    def files(self, name: str) -> list[str]:
        """Return the files of this project on an instruction's stack, the innermost first.

        A fusion takes those of the first instruction with any, in the order of `origin`.
        """
        instruction = self._instruction(name)
        fused = list(self._fused(instruction))
        for one in (*_principal(instruction, fused), *fused):
            files = [_project_file(file) for file, _ in self._frames_of(_fields(one))]
            if found := [file for file in files if file is not None]:
                return found
        return []

    def _source_of_neighbors(self, name: str) -> str:
        """Return the source of the first user that has one, else of the first operand; else ''."""
        computation = self._computation[name]
        instructions = self.program.computations[computation]
        if computation not in self._users:
            users = self._users[computation] = collections.defaultdict(list)
            for user, instruction in instructions.items():
                for operand in instruction.operands:
                    users[operand].append(user)
        for neighbors in (self._users[computation].__getitem__, self._operands_of):
            seen, queue = {name}, [name]
            for reached in queue:
                for neighbor in neighbors(reached):
                    if neighbor in seen or neighbor not in instructions:
                        continue
                    if source := self._own_origin(instructions[neighbor]).source:
                        return source
                    if _MOVES.match(instructions[neighbor].opcode):
                        seen.add(neighbor)
                        queue.append(neighbor)
        return ""

    def _operands_of(self, name: str) -> Sequence[str]:
        return self._instruction(name).operands

    def _instruction(self, name: str) -> hlo.Instruction:
        return self.program.computations[self._computation[name]][name]

    def _fused(self, instruction: hlo.Instruction) -> Iterator[hlo.Instruction]:
        """Yield the instructions that are executed as one; the root comes last."""
        if instruction.opcode in ("while", "conditional"):
            return
        computation = self._computation[instruction.name]
        for called, _ in self.program.called(computation, instruction):
            for one in self.program.computations[called].values():
                yield from self._fused(one)
                yield one

    def _own_origin(self, instruction: hlo.Instruction) -> Origin:
        fields = _fields(instruction)
        operation = _operation(fields.get("op_name", ""), instruction.opcode)
        return Origin(_source(self._frames_of(fields)), operation)

    def _frames_of(self, fields: dict[str, str]) -> Iterator[tuple[str, int]]:
        """Yield file and line of each stack frame, the innermost first."""
        if "source_file" in fields:
            yield fields["source_file"], int(fields.get("source_line", 0))
        frame = int(fields.get("stack_frame_id", 0))
        while frame in self._frames:
            location = self._locations[self._frames[frame]["file_location_id"]]
            yield self._files[location["file_name_id"]], location["line"]
            frame = self._frames[frame]["parent_frame_id"]


def _principal(
    instruction: hlo.Instruction, fused: Sequence[hlo.Instruction]
) -> Iterator[hlo.Instruction]:
    """Yield what an instruction is mainly for: its largest product, itself, its root."""
    products = [one for one in fused if one.opcode in _PRODUCTS]
    if products:
        yield max(products, key=lambda one: hlo.size(one.result))
    yield instruction
    yield from fused[-1:]


def _fields(instruction: hlo.Instruction) -> dict[str, str]:
    """Return the fields of an instruction's metadata."""
    found = _METADATA.search(instruction.attributes)
    return {key: text or number for key, text, number in _FIELD.findall(found[1] if found else "")}


def _kernel_name(name: str) -> str:
    """Return an instruction's name as XLA spells it in a kernel's name."""
    return re.sub(r"\W", "_", name)


def _operation(op_name: str, opcode: str) -> str:
    """Return the pass and the primitive of an op_name, e.g. 'backward/dot_general'.

    Merged instructions have all their op_names, separated by semicolons; the first counts.
    """
    op_name = op_name.partition(";")[0].rstrip(":")
    primitive = op_name.rpartition("/")[2]
    if not primitive or primitive in _SCOPES or primitive.endswith(")"):
        primitive = opcode
    if opcode == "dot" and primitive in ("dot", "transpose"):  # XLA merges transposes into products
        primitive = "dot_general"
    if "rematted_computation" in op_name:
        return f"recompute/{primitive}"
    if "transpose(" in op_name:
        return f"backward/{primitive}"
    return f"forward/{primitive}" if "jvp(" in op_name else primitive


def _source(frames: Iterable[tuple[str, int]]) -> str:
    """Return the innermost frame of this project, else the innermost outside libraries, else ''."""
    shared = outside = ""
    for file, line in frames:
        if name := _project_file(file):
            if name not in _SHARED:
                return f"{name}:{line}"
            shared = shared or f"{name}:{line}"
        elif not _LIBRARIES.search(file):
            path = pathlib.Path(file)
            path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            outside = outside or f"{path.as_posix()}:{line}"
    return shared or outside


def _project_file(file: str) -> str | None:
    """Return the path of a file in the repository; None if it is not of this project."""
    path = pathlib.Path(file)
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    return name if name.startswith(_PACKAGES) else None


def _read_tables(text: str) -> dict[str, dict[int, Any]]:
    """Return the tables of files and frames at the head of a program's text, keyed by number.

    Some versions of XLA print a frame's parent as its number plus one. The root frames, whose
    parent is 0, show which.
    """
    tables: dict[str, dict[int, Any]] = {title: {} for title in _TABLES}
    table: dict[int, Any] | None = None
    for line in text.splitlines():
        if line in tables:
            table = tables[line]
        elif not line:
            continue
        elif table is not None and (row := re.match(r'(\d+) (?:"(.*)"|\{(.*)\})$', line)):
            fields = re.findall(r"(\w+)=(\d+)", row[3] or "")
            table[int(row[1])] = row[2] if row[3] is None else {k: int(v) for k, v in fields}
        elif table is not None:
            break
    frames = tables["StackFrames"].values()
    offset = min((frame.setdefault("parent_frame_id", 0) for frame in frames), default=0)
    for frame in frames:
        frame["parent_frame_id"] -= offset
    return tables
