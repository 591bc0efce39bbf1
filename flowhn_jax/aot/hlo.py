"""Parse a compiled program's text (HLO): its instructions, and the arrays that they return."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_BEGIN = re.compile(r"\s+(ROOT )?%?[\w.-]+ = ")
_CALLS = re.compile(
    r"(?:calls|true_computation|false_computation)=%([\w.-]+)|branch_computations=\{([^}]*)\}"
)


class Array(NamedTuple):
    """An array, or an element of a tuple, of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    layout: str  # such as '{1,0:T(8,128)(2,1)S(1)}'; empty if the program gives none

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return _BYTES[self.dtype] * self.elements

    @property
    def padded_bytes(self) -> int:
        """Bytes in the memory of a TPU, where the minor dimensions are filled up to whole tiles."""
        found = re.match(r"\{([\d,]*):T\(([\d,]+)\)", self.layout)
        if found is None:
            return self.bytes
        shape, minor_first = list(self.shape), [int(n) for n in found[1].split(",") if n]
        tile = [int(n) for n in found[2].split(",")]
        for dimension, side in zip(minor_first, reversed(tile), strict=False):
            shape[dimension] += -shape[dimension] % side
        return _BYTES[self.dtype] * math.prod(shape)

    @property
    def in_main_memory(self) -> bool:
        """Whether it is in main memory; S(n) marks other memories of a TPU."""
        return re.search(r"S\([1-9]\)", self.layout) is None


class Instruction(NamedTuple):
    """One line: `name = result opcode(operands), attributes`."""

    name: str
    result: str  # type, such as 'bf16[8,16]{1,0:T(8,128)}', or several in parentheses
    opcode: str
    operands: tuple[str, ...]  # names; a parameter's number, a constant's value
    attributes: str


class Program:
    """The computations of a program by name, each with its instructions in scheduled order."""

    def __init__(self, text: str):
        """Parse `text`, the result of `jax.stages.Compiled.as_text`."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        lines: list[str] | None = None  # of the current computation
        for line in text.splitlines():
            if lines is None:
                if found := _HEADER.match(line):
                    name, lines = found[2], []
                    self.entry = name if found[1] else self.entry
            elif _END.match(line):
                computation = self.computations[name] = {}
                for instruction in map(_parse, lines):
                    for operand in instruction.operands:
                        _spell_out(computation, operand)
                    computation[instruction.name] = instruction
                lines = None
            elif _BEGIN.match(line):
                lines.append(line)
            else:  # some attributes span several lines
                lines[-1] += line

    def runs(self) -> dict[str, int]:
        """Return how often each computation runs per run of the program, counting all branches."""
        counts: dict[str, int] = defaultdict(int)

        def run(name: str, times: int) -> None:
            counts[name] += times
            for instruction in self.computations[name].values():
                for called, again in self.called(name, instruction):
                    run(called, times * again)

        run(self.entry, 1)
        return counts

    def called(self, computation: str, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """Yield the computations that an instruction runs, and how often; not a reduction's sum."""
        attributes = instruction.attributes
        if instruction.opcode == "while":
            yield _search(r"body=%([\w.-]+)", instruction)[1], self._trips(computation, instruction)
            return
        if instruction.opcode == "call":
            yield _search(r"to_apply=%([\w.-]+)", instruction)[1], 1
            return
        for one, several in _CALLS.findall(attributes):
            for name in [one] if one else re.findall(r"%([\w.-]+)", several):
                yield name, 1

    def _trips(self, computation: str, loop: Instruction) -> int:
        """Return how often a loop's body runs, according to XLA or to the loop's counter.

        Without a counter it is 1: such a loop runs again only if its result is not exact.
        """
        if known := re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(known[1])
        found = _search(r"condition=%([\w.-]+), body=%([\w.-]+)", loop)
        condition, body = (self.computations[name] for name in found.groups())
        compare = next((x for x in reversed(condition.values()) if x.opcode == "compare"), None)
        if compare is None:
            return 1
        counter, limit = (condition[name] for name in compare.operands)
        if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
            raise ValueError(f"The loop {loop.name} has no counter with a constant limit.")
        index = tuple_index(counter)
        start = self._constant(self.computations[computation], loop.operands[0], index) or 0
        step = self._step(body, index)
        return -(-(int(limit.operands[0]) - start) // step)

    def _constant(self, instructions: dict[str, Instruction], name: str, index: int) -> int | None:
        """Return the constant at an index of a tuple; None if it is not a constant."""
        tuple_ = instructions.get(name)
        if tuple_ is None or tuple_.opcode != "tuple":
            return None
        value = instructions[tuple_.operands[index]]
        while value.opcode in ("copy", "bitcast"):
            value = instructions[value.operands[0]]
        return int(value.operands[0]) if value.opcode == "constant" else None

    def _step(self, body: dict[str, Instruction], index: int) -> int:
        """Return the increment of a loop's counter; 1 if its sum is inside a fusion."""
        root = next(reversed(body.values()))
        added = body[root.operands[index]]
        while added.opcode in ("copy", "bitcast"):
            added = body[added.operands[0]]
        if added.opcode == "add":
            for name in added.operands:
                if body[name].opcode == "constant":
                    return int(body[name].operands[0])
        return 1


def tuple_index(element: Instruction) -> int:
    """Return the index of a get-tuple-element."""
    return int(_search(r"index=(\d+)", element)[1])


def _search(pattern: str, instruction: Instruction) -> re.Match[str]:
    """Return the match of a pattern that the instruction's attributes must have."""
    found = re.search(pattern, instruction.attributes)
    if found is None:
        raise ValueError(f"The instruction {instruction.name} has no attribute {pattern!r}.")
    return found


def arrays(result: str) -> list[Array]:
    """Return the array of a type, or the arrays of a tuple."""
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
        for dtype, shape, layout in _ARRAY.findall(result)
    ]


def size(result: str, *, main_memory_only: bool = False) -> int:
    """Return the bytes of a type or of a tuple's elements, without padding."""
    return sum(x.bytes for x in arrays(result) if x.in_main_memory or not main_memory_only)


def _parse(line: str) -> Instruction:
    name, _, rest = re.sub(r"/\*.*?\*/", "", line).strip().partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    operands = tuple(part.split()[-1].lstrip("%") for part in split(rest[: end - 1]))
    return Instruction(
        name.removeprefix("ROOT ").lstrip("%"), result, opcode, operands, rest[end:].lstrip(", ")
    )


def _spell_out(computation: dict[str, Instruction], operand: str) -> None:
    """Add the get-tuple-element that an operand such as 'name#1' abbreviates."""
    base, mark, index = operand.rpartition("#")
    if not mark or operand in computation:
        return
    _spell_out(computation, base)
    element = split(computation[base].result[1:-1])[int(index)].strip()
    attributes = f"index={index}"
    computation[operand] = Instruction(operand, element, "get-tuple-element", (base,), attributes)


def _closing(text: str) -> int:
    """Return the index after the parenthesis that closes the first one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i + 1
    raise ValueError(f"The program's text has an unclosed parenthesis: {text[:80]!r}")


def split(text: str) -> list[str]:
    """Return the parts between commas that are not inside brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if character == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in (*parts, text[start:]) if part.strip()]
