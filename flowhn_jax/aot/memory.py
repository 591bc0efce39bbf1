"""What a device's memory holds in a compiled train step, by kind."""

import dataclasses
import math
import re
from typing import Any

import jax

from flowhn_jax.aot.hlo import Instruction, Program, size, split
from flowhn_jax.checkpoints.state import TrainState
from flowhn_jax.models.loss import Batch

_SAME_BUFFER = ("bitcast", "get-tuple-element", "tuple", "while", "optimization-barrier")
_NO_BUFFER = ("parameter", "constant")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: int
    optimizer: int
    batch: int
    activations: int  # at the peak, what the forward pass made: for the backward pass, mostly
    temporaries: int  # at the peak, all else: gradients, gathered parameters, results under way
    program: int  # machine code, or what is allowed for it

    @property
    def total(self) -> int:
        """What the step needs."""
        return sum(dataclasses.asdict(self).values())


def memory(program: Program, state: TrainState, batch: Batch, data: int, code: int) -> Memory:
    """Of a step, from XLA's sizes and from the schedule.

    Args:
      program: the step's text.
      state: shapes, dtypes and shardings of the train state.
      batch: those of the batch.
      data: bytes of the program's arguments, results and temporaries.
      code: bytes of the machine code.
    """
    parameters, optimizer = shard_bytes(state.params), shard_bytes((state.step, state.opt_state))
    rows = shard_bytes(batch)
    beside = data - parameters - optimizer - rows
    kept = min(activations(program), beside)
    return Memory(parameters, optimizer, rows, kept, beside - kept, code)


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )


def activations(program: Program) -> int:
    """Bytes of the forward pass's results that are in use where the most memory is.

    Buffers are followed through the schedule, those inside loops included; a result counts to the
    forward pass by the name that autodiff gave to what made it, and a copy as what it is of.
    """
    return _peak(program, program.entry)[1]


def _peak(program: Program, computation: str) -> tuple[int, int]:
    """The most bytes in use at a time while it runs, and how many of them are forward results."""
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
            is_forward |= {b: own for b in read if "op_name" not in instructions[b[0]].attributes}
        in_use |= {buffer: held for buffer, held in made if buffer in last_use}
        live, inside = sum(in_use.values()), 0
        if instruction.opcode in ("while", "conditional", "call"):
            called = program.called(computation, instruction)
            inside = max(_peak(program, name)[0] for name, _ in called)
        if live + inside > peak[0]:
            forward = sum(held for buffer, held in in_use.items() if is_forward[buffer])
            peak = live + inside, forward
        for buffer in ending.get(position, ()):
            in_use.pop(buffer, None)
    return peak


_Buffer = tuple[str, int | None]  # who made it, and which of several results it is


def _made(instruction: Instruction) -> list[tuple[_Buffer, int]]:
    """The buffers in main memory that an instruction makes, and their bytes."""
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
    """The buffers that a name stands for, or one of its places."""
    instruction = instructions.get(name)
    if instruction is None:
        return []
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
        return _sources(instructions, operands[0], index)
    if opcode == "tuple" and index is not None:
        return _sources(instructions, operands[index])
    if opcode in _SAME_BUFFER or opcode.endswith("-start"):
        return [buffer for operand in operands for buffer in _sources(instructions, operand, index)]
    own = [(name, index)]
    if index is None and instruction.result.startswith("("):
        own = [(name, i) for i in range(len(split(instruction.result[1:-1])))]
    if opcode.endswith("-done"):  # until then its start reads what it was given
        own += _sources(instructions, operands[0])
    return own


def _is_forward(instruction: Instruction, unnamed: bool) -> bool:
    """Whether autodiff's name for it is of the first pass; XLA's copies have no name."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return unnamed if found is None else "jvp(" in found[1] and "transpose(" not in found[1]
