"""What an instruction of a scheduled program computes and moves."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from flowhn_jax.aot.hlo import Array, Instruction, Program, arrays, split

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_PRODUCTS = ("dot", "convolution")
# These move nothing: XLA lays out their operands and results so that they are the same memory.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier", "opt-barrier", "domain"),
)
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
# No arithmetic of a vector unit.
_NO_ARITHMETIC = (*_FREE, "broadcast", "iota", "reshape")
_MOVES = (
    *("copy", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice"),
    *("concatenate", "pad", "reverse", "broadcast", "iota", "fusion"),
    *("copy-start", "copy-done", "async-start", "async-done"),
)
_SLICES = ("slice", "dynamic-slice", "gather")


class Work(NamedTuple):
    """What one execution of an instruction needs at least.

    Attributes:
      flops: FLOPs of its matrix products, 2 per multiplication and addition.
      moved: bytes read from and written to main memory, padded.
      vector: elements that it computes outside of products.
      loaded: bytes read from any memory of a TPU, VMEM included.
      stored: bytes written to any memory of a TPU.
      is_async: whether it runs next to the instructions that follow.
    """

    flops: int = 0
    moved: int = 0
    vector: int = 0
    loaded: int = 0
    stored: int = 0
    is_async: bool = False


class Workload:
    """The work of a program's instructions."""

    def __init__(self, program: Program):
        """Read the work of `program`."""
        self._program = program
        self._inside: dict[str, tuple[int, int]] = {}  # FLOPs and elements of fused computations

    def of(self, computation: str, instruction: Instruction) -> Work | None:
        """Return the work of an instruction; None if it is free or only calls others."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode in ("while", "call", "conditional", "async-update"):
            return None
        if opcode.endswith("-done") or call_target(instruction) in _FREE_CALLS:
            return None
        instructions = self._program.computations[computation]
        operands = _operands(instruction, instructions)
        results = arrays(instruction.result)
        fused = self.fused(computation, instruction)
        if opcode.endswith("-start"):
            return Work(moved=self._moved_by_start(instruction, operands, fused), is_async=True)
        if fused is not None and opcode == "fusion":
            return self._of_fusion(instruction, operands, results, fused)
        flops = _flops(instruction, operands, results)
        if opcode == "custom-call":
            return Work(flops, _moved((*_flat(operands), *results)))
        read, written = _flat(operands), results
        if opcode in _SLICES:
            read = results
        elif opcode == "dynamic-update-slice":
            read = written = operands[1]
        return Work(
            flops,
            _moved((*read, *written)),
            _arithmetic(instruction, instructions),
            sum(x.padded_bytes for x in read),
            sum(x.padded_bytes for x in written),
        )

    def fused(self, computation: str, instruction: Instruction) -> str | None:
        """Return the computation that an instruction executes as one; None without one."""
        if instruction.opcode in ("while", "call", "conditional"):
            return None
        return next((name for name, _ in self._program.called(computation, instruction)), None)

    def instructions(self, computation: str, instruction: Instruction) -> Iterator[Instruction]:
        """Yield an instruction and, of a fusion, those in it."""
        yield instruction
        fused = self.fused(computation, instruction)
        for one in self._program.computations[fused].values() if fused else ():
            yield from self.instructions(fused or "", one)

    def only_moves(self, computation: str, instruction: Instruction) -> bool:
        """Return whether an instruction changes no number, but its place, layout or shape."""
        first, *inside = self.instructions(computation, instruction)
        return all(x.opcode in (*_MOVES, *_FREE) for x in inside or [first])

    def _of_fusion(
        self,
        instruction: Instruction,
        operands: list[list[Array]],
        results: list[Array],
        fused: str,
    ) -> Work:
        flops, vector = self._within(fused)
        passing = _passing_through(instruction) if self._has_collective(fused) else {}
        moved = loaded = stored = 0
        for i, arrays_of in enumerate(operands):
            if i in passing.values():
                continue
            used = self._read(fused, i, sum(x.padded_bytes for x in arrays_of))
            loaded += used
            moved += used if all(x.in_main_memory for x in arrays_of) else 0
        for i, (array, used) in enumerate(zip(results, self._written(fused, results), strict=True)):
            if i not in passing:
                stored += used
                moved += used if array.in_main_memory else 0
        return Work(flops, moved, vector, loaded, stored)

    def _has_collective(self, fused: str) -> bool:
        inside = self._program.computations[fused].values()
        return any(x.opcode in COLLECTIVES for x in inside)

    def _within(self, fused: str) -> tuple[int, int]:
        """Return the FLOPs of products and the elements of arithmetic in a fused computation."""
        if fused not in self._inside:
            flops = vector = 0
            instructions = self._program.computations[fused]
            for instruction in instructions.values():
                inner = self.fused(fused, instruction)
                if inner is not None and instruction.opcode == "fusion":
                    more, elements = self._within(inner)
                    flops += more
                    vector += elements
                else:
                    operands = _operands(instruction, instructions)
                    flops += _flops(instruction, operands, arrays(instruction.result))
                    vector += _arithmetic(instruction, instructions)
            self._inside[fused] = flops, vector
        return self._inside[fused]

    def _read(self, fused: str, index: int, whole: int) -> int:
        """Return the bytes that a fused computation reads of an operand with `whole` bytes.

        Slices and gathers read what they return; a buffer that is updated in place is not read.
        """
        instructions = self._program.computations[fused]
        parameters = (x for x in instructions.values() if x.opcode == "parameter")
        names = {x.name for x in parameters if x.operands == (str(index),)}
        total = 0
        for user in instructions.values():
            used = [i for i, name in enumerate(user.operands) if name in names]
            if not used:
                continue
            inner = self.fused(fused, user)
            if user.opcode == "bitcast" or (inner is not None and self._only_bitcasts(inner)):
                names.add(user.name)
            elif user.opcode in _SLICES and used == [0]:
                total += sum(x.padded_bytes for x in arrays(user.result))
            elif user.opcode == "fusion" and inner is not None:
                total += sum(self._read(inner, i, whole) for i in used)
            elif not (user.opcode == "dynamic-update-slice" and used == [0]):
                return whole
        is_result = next(reversed(instructions)) in names
        return whole if is_result else min(total, whole)

    def _only_bitcasts(self, fused: str) -> bool:
        """Return whether a computation returns its operand as another type of the same bytes."""
        inside = self._program.computations[fused].values()
        return all(x.opcode in ("parameter", "bitcast") for x in inside)

    def _written(self, fused: str, results: list[Array]) -> list[int]:
        """Return the bytes that a fused computation writes of each of its results."""
        instructions = self._program.computations[fused]
        root = next(reversed(instructions.values()))
        names = root.operands if root.opcode == "tuple" else (root.name,)
        if len(names) != len(results):  # a nested fusion with several results is the root
            inner = self.fused(fused, root)
            return self._written(inner, results) if inner else [x.padded_bytes for x in results]
        return [self._written_by(fused, name, x) for name, x in zip(names, results, strict=True)]

    def _written_by(self, fused: str, name: str, result: Array) -> int:
        instructions = self._program.computations[fused]
        while (source := instructions[name]).opcode == "bitcast":
            name = source.operands[0]
        inner = self.fused(fused, source)
        if source.opcode == "fusion" and inner is not None:
            return self._written(inner, [result])[0]
        if source.opcode == "dynamic-update-slice":
            update = arrays(instructions[source.operands[1]].result)
            return min(result.padded_bytes, sum(x.padded_bytes for x in update))
        return result.padded_bytes

    def _moved_by_start(
        self, instruction: Instruction, operands: list[list[Array]], fused: str | None
    ) -> int:
        """Return the bytes that an asynchronous copy or slice moves; 0 for a collective."""
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            return 0
        if fused is None:  # copy-start: (target, source, context)
            return _moved(arrays(instruction.result)[:2])
        instructions = self._program.computations[fused]
        root = next(reversed(instructions.values()))
        if root.opcode in COLLECTIVES:
            return 0
        if root.opcode == "dynamic-update-slice":
            return 2 * sum(x.padded_bytes for x in arrays(instructions[root.operands[1]].result))
        # ((operands), target, context); a slice reads what it writes.
        target = arrays(split(instruction.result[1:-1])[1])
        return _moved(target) + sum(
            x.padded_bytes for x in target if all(y.in_main_memory for y in _flat(operands))
        )


def call_target(instruction: Instruction) -> str:
    """Return the target of a custom call; empty for other instructions."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found and instruction.opcode == "custom-call" else ""


def _operands(instruction: Instruction, instructions: dict[str, Instruction]) -> list[list[Array]]:
    """Return the arrays of each operand; none for a constant's value or a parameter's number."""
    names = (name for name in instruction.operands if name in instructions)
    return [arrays(instructions[name].result) for name in names]


def _flat(operands: Iterable[list[Array]]) -> list[Array]:
    return [x for each in operands for x in each]


def _moved(each: Iterable[Array]) -> int:
    return sum(x.padded_bytes for x in each if x.in_main_memory)


def _passing_through(fusion: Instruction) -> dict[int, int]:
    """Return the results of a fusion that are its operands, as indices.

    A fusion in which a collective proceeds passes the collective's buffers through.
    """
    found = re.search(r"output_to_operand_aliasing=\{(.*?\}\)?)\}", fusion.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+),", found[1]) if found else ()
    return {int(result or 0): int(operand) for result, operand in pairs}


def _arithmetic(instruction: Instruction, instructions: dict[str, Instruction]) -> int:
    """Return the elements that an instruction computes, or that a reduction reads."""
    if instruction.opcode in (*_NO_ARITHMETIC, *_PRODUCTS, "custom-call"):
        return 0
    source = instruction
    if instruction.opcode == "reduce":
        source = instructions[instruction.operands[0]]
    return max((x.elements for x in arrays(source.result)), default=0)


def _flops(
    instruction: Instruction, operands: Sequence[list[Array]], results: Sequence[Array]
) -> int:
    """Return the FLOPs of a product or of a library's call; 0 for other instructions."""
    if instruction.opcode == "dot":
        return _dot(instruction, operands[0][0], results[0])
    if instruction.opcode == "convolution":
        return _convolution(instruction, operands[0][0], operands[1][0], results[0])
    target = call_target(instruction)
    if target.startswith("__cublas$"):
        contracted = _backend(instruction)["lhs_contracting_dimensions"]
        left = operands[0][0].shape
        return 2 * results[0].elements * math.prod(left[int(d)] for d in contracted)
    if target.startswith("__cudnn$fmha"):
        return _flash_attention(instruction, operands[0][0], target.endswith("Backward"))
    return 0


def _dot(instruction: Instruction, left: Array, out: Array) -> int:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    dimensions = [int(n) for n in found[1].split(",") if n] if found else []
    return 2 * out.elements * math.prod(left.shape[d] for d in dimensions)


def _convolution(instruction: Instruction, left: Array, right: Array, out: Array) -> int:
    """Return the FLOPs of a convolution, as which XLA writes matrix products for TPUs.

    Multiplications with padding do not count.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if found is None:
        raise ValueError(f"The convolution {instruction.name} has no dim_labels.")
    of_left, of_right, of_out = found.groups()
    batch, features = out.shape[of_out.index("b")], out.shape[of_out.index("f")]
    flops = 2 * batch * features * right.shape[of_right.index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def field(name: str, dimension: int, default: str) -> str:
        return fields[name].split("x")[dimension] if name in fields else default

    for d in range(sum(label.isdigit() for label in of_out)):
        size, stride = int(field("size", d, "1")), int(field("stride", d, "1"))
        spread, apart = int(field("lhs_dilate", d, "1")), int(field("rhs_dilate", d, "1"))
        before = int(field("pad", d, "0_0").partition("_")[0])
        last = (left.shape[of_left.index(str(d))] - 1) * spread
        flops *= sum(
            0 <= (at := o * stride - before + k * apart) <= last and at % spread == 0
            for o in range(out.shape[of_out.index(str(d))])
            for k in range(size)
        )
    return flops


def _flash_attention(call: Instruction, q: Array, backward: bool) -> int:
    """Return the FLOPs of cuDNN's 2 products forward or 5 backward, half with a causal mask."""
    config = _backend(call)
    # [B, H, queries, keys]
    scores = math.prod(int(n) for n in config["intermediate_tensor_shape"]["dimensions"])
    flops = (5 if backward else 2) * 2 * scores * q.shape[-1]
    return flops // 2 if "CAUSAL" in config["mask_type"] else flops


def _backend(call: Instruction) -> dict:
    """Return the fields of a library call's config, those of inner objects included."""
    text = call.attributes.partition("backend_config=")[2]
    fields = json.JSONDecoder().raw_decode(text)[0]
    merged: dict = {}
    for key, value in fields.items():
        merged |= value if isinstance(value, dict) else {key: value}
    for value in [*merged.values()]:
        if isinstance(value, dict) and "lhs_contracting_dimensions" in value:
            merged |= value
    return merged
