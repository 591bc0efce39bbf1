"""Memory of a compiled train step per device, by kind."""

import dataclasses
import math
import re
from typing import Any

import jax

from flowhn_jax.aot.hlo import Instruction, Program, size, split, tuple_index
from flowhn_jax.checkpoints.state import TrainState
from flowhn_jax.models.loss import Batch

_SAME_BUFFER = ("bitcast", "get-tuple-element", "tuple", "while", "optimization-barrier")
_NO_BUFFER = ("parameter", "constant")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
      parameters: the parameters of the model.
      optimizer: its state, the step, and the average of the parameters if there is one (train.ema).
      batch: tokens and segment ids.
      activations: results of the forward pass that are alive at the peak, mostly for the backward
        pass.
      temporaries: all other temporaries at the peak: gradients, gathered parameters, intermediate
        results.
      program: machine code, or an allowance for it.
    """

    parameters: int
    optimizer: int
    batch: int
    activations: int
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        """All bytes that the step needs."""
        return sum(dataclasses.asdict(self).values())


def memory(program: Program, state: TrainState, batch: Batch, data: int, code: int) -> Memory:
    """Return the memory of a step, from XLA's sizes and the schedule.

    Args:
      program: the step's text.
      state: shapes, dtypes and shardings of the train state.
      batch: shapes, dtypes and shardings of the batch.
      data: bytes of the program's arguments, results and temporaries.
      code: bytes of the machine code.
    """
    parameters = shard_bytes(state.params)
    optimizer = shard_bytes((state.step, state.opt_state, state.ema))
    rows = shard_bytes(batch)
    rest = data - parameters - optimizer - rows
    forward = min(activations(program), rest)
    return Memory(parameters, optimizer, rows, forward, rest - forward, code)


def shard_bytes(tree: Any) -> int:
    """Return the bytes of a tree's arrays per device."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )


def activations(program: Program) -> int:
    """Return the bytes of the forward pass's results that are alive at the peak of memory.

    Buffers are followed through the schedule, including those inside loops. A result belongs to the
    forward pass if autodiff's name of its instruction does, a copy if its source does.
    """
    return _peak(program, program.entry)[1]


def _peak(program: Program, computation: str) -> tuple[int, int]:
    """Return the peak of the bytes in use, and how many of them are forward results."""
    instructions = program.computations[computation]
    last_use: dict[_Buffer, int] = {}
    for position, instruction in enumerate(instructions.values()):
        for operand in instruction.operands:
            last_use |= dict.fromkeys(_sources(instructions, operand), position)
    ending: dict[int, list[_Buffer]] = {}
    for buffer, position in last_use.items():
        ending.setdefault(position, []).append(buffer)

    in_use: dict[_Buffer, int] = {}  # bytes
    is_forward: dict[_Buffer, bool] = {}
    peak = 0, 0
    for position, instruction in enumerate(instructions.values()):
        made = _made(instruction)
        if made or instruction.opcode == "while":
            read = [b for operand in instruction.operands for b in _sources(instructions, operand)]
            own = _is_forward(instruction, any(is_forward.get(b) for b in read))
            is_forward |= {buffer: own for buffer, _ in made}
            if instruction.opcode == "while":  # it fills buffers that were only allocated before
                unnamed = [b for b in read if "op_name" not in instructions[b[0]].attributes]
                is_forward |= dict.fromkeys(unnamed, own)
        in_use |= {buffer: count for buffer, count in made if buffer in last_use}
        live, inside = sum(in_use.values()), 0
        if instruction.opcode in ("while", "conditional", "call"):
            called = program.called(computation, instruction)
            inside = max(_peak(program, name)[0] for name, _ in called)
        if live + inside > peak[0]:
            forward = sum(count for buffer, count in in_use.items() if is_forward[buffer])
            peak = live + inside, forward
        for buffer in ending.get(position, ()):
            in_use.pop(buffer, None)
    return peak


_Buffer = tuple[str, int | None]  # name of the instruction that makes it, index of its result


def _made(instruction: Instruction) -> list[tuple[_Buffer, int]]:
    """Return the buffers in main memory that an instruction makes, and their bytes."""
    opcode, name = instruction.opcode, instruction.name
    if opcode in _SAME_BUFFER or opcode in _NO_BUFFER or opcode.endswith("-start"):
        return []
    if not instruction.result.startswith("("):
        return [((name, None), size(instruction.result, main_memory_only=True))]
    parts = split(instruction.result[1:-1])
    return [((name, i), size(part, main_memory_only=True)) for i, part in enumerate(parts)]


def _sources(
    instructions: dict[str, Instruction], name: str, index: int | None = None
) -> list[_Buffer]:
    """Return the buffers that a name, or one element of a tuple, refers to."""
    instruction = instructions.get(name)
    if instruction is None:
        return []
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "get-tuple-element":
        return _sources(instructions, operands[0], tuple_index(instruction))
    if opcode == "tuple" and index is not None:
        return _sources(instructions, operands[index])
    if opcode in _SAME_BUFFER or opcode.endswith("-start"):
        return [buffer for operand in operands for buffer in _sources(instructions, operand, index)]
    own: list[_Buffer] = [(name, index)]
    if index is None and instruction.result.startswith("("):
        own = [(name, i) for i in range(len(split(instruction.result[1:-1])))]
    if opcode.endswith("-done"):  # its start reads its operands until then
        own += _sources(instructions, operands[0])
    return own


def _is_forward(instruction: Instruction, unnamed: bool) -> bool:
    """Return whether autodiff's name of it is of the forward pass; `unnamed` if it has no name."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return unnamed if found is None else "jvp(" in found[1] and "transpose(" not in found[1]
