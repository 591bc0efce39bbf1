"""The collectives of a compiled program: what devices receive, and the time of their links."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flowhn_jax.aot.hlo import Instruction, Program, size
from flowhn_jax.aot.topology import Topology

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device is not a type to the checker

# Bytes that each of n devices receives, for an argument of b bytes per device.
_RECEIVED = {
    "all-gather": lambda b, n: (n - 1) * b,
    "reduce-scatter": lambda b, n: (n - 1) * b / n,
    "all-reduce": lambda b, n: 2 * (n - 1) * b / n,
    "all-to-all": lambda b, n: (n - 1) * b / n,
    "ragged-all-to-all": lambda b, n: (n - 1) * b / n,
    "collective-permute": lambda b, n: b,
    "send": lambda b, n: b,  # to other slices of TPUs
}


class Transfer(NamedTuple):
    """One execution of a collective.

    Attributes:
      kind: such as 'all-gather'.
      received: bytes that each device receives.
      seconds: time of the links.
    """

    kind: str
    received: float
    seconds: float


class Traffic(NamedTuple):
    """All collectives of one kind in a step.

    Attributes:
      count: number of executions per step.
      received: bytes that each device receives per step.
      seconds: time of the links per step, one collective after the other.
    """

    count: int
    received: float
    seconds: float


def traffic(
    program: Program, devices: "Sequence[Device]", topology: Topology
) -> dict[str, Traffic]:
    """Return the traffic of a program by kind of collective.

    Args:
      program: the compiled step.
      devices: the devices of its mesh, in the mesh's order.
      topology: the topology of the devices.
    """
    total: dict[str, Traffic] = {}
    runs = program.runs()
    for (name, _), (kind, received, seconds) in transfers(program, devices, topology).items():
        before = total.get(kind, Traffic(0, 0.0, 0.0))
        total[kind] = Traffic(
            before.count + runs[name],
            before.received + runs[name] * received,
            before.seconds + runs[name] * seconds,
        )
    return total


def transfers(
    program: Program, devices: "Sequence[Device]", topology: Topology
) -> dict[tuple[str, str], Transfer]:
    """Return the collectives of a program, by the names of their computation and instruction.

    Times assume an algorithm that uses all links of the group at once, with no other traffic on
    them. Two permutations in opposite directions share no link and count once.

    The arguments are those of `traffic`.
    """
    found: dict[tuple[str, str], Transfer] = {}
    seen: set[tuple[str, str]] = set()
    for name in program.runs():
        instructions = program.computations[name]
        permutations = [pairs for x in instructions.values() if (pairs := _pairs(x)) is not None]
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _RECEIVED or _is_again(instruction, seen):
                continue
            received, seconds = _cost(kind, instruction, instructions, devices, topology)
            pairs = _pairs(instruction)
            opposite = {(b, a) for a, b in pairs or ()}
            if opposite != pairs and opposite in permutations:
                seconds /= 2
            found[name, instruction.name] = Transfer(kind, received, seconds)
    return found


def _is_again(instruction: Instruction, seen: set[tuple[str, str]]) -> bool:
    """Return whether an earlier instruction belongs to the same collective.

    On TPUs one collective may be spread over several fusions.
    """
    chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    if chain is None or channel is None:
        return False
    key = chain[1], channel[1]
    if key in seen:
        return True
    seen.add(key)
    return False


def _cost(
    kind: str,
    instruction: Instruction,
    instructions: dict[str, Instruction],
    devices: "Sequence[Device]",
    topology: Topology,
) -> tuple[float, float]:
    """Return the bytes that each device receives, and the time of the links."""
    operands = instruction.operands[:1] if kind == "send" else instruction.operands
    own = sum(size(instructions[operand].result) for operand in operands)
    if kind == "send":
        return own, own / topology.chip.network_rate
    pairs = _pairs(instruction)
    if pairs is not None:
        between = [(devices[a], devices[b]) for a, b in pairs if a != b]
        return own, topology.seconds_of_pairs(between, own) if between else 0.0
    groups = replica_groups(instruction.attributes, len(devices))
    received = _RECEIVED[kind](own, len(groups[0]))
    return received, max(
        topology.seconds([devices[i] for i in group], received) for group in groups
    )


def _pairs(instruction: Instruction) -> set[tuple[int, int]] | None:
    """Return the (source, target) pairs of a permutation; None for other instructions."""
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
    if found is None:
        return None
    return {(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", found[1] + "}")}


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """Return the groups of a collective, as indices in the mesh's order.

    XLA writes them as '{{0,1},{2,3}}', '[2,2]<=[4]', '[2,2]<=[2,2]T(1,0)' or
    "mesh['a'=2,'b'=2] {'b'}".

    Raises:
      ValueError: they are written in another form.
    """
    text = attributes.partition("replica_groups=")[2]
    if text.startswith("{"):
        inside = text[1 : text.index("}}") + 1] if text.startswith("{{") else ""
        groups = [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)", inside)]
        return groups or [list(range(devices))]
    if found := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source = (list(map(int, found[i].split(","))) for i in (1, 2))
        order = list(map(int, found[3].split(","))) if found[3] else None
        ids = np.arange(devices).reshape(source).transpose(order)
        return [list(map(int, group)) for group in ids.reshape(shape)]
    if found := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", text):
        axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[2])
        return _mesh_groups(axes, chosen)
    raise ValueError(f"replica_groups has an unknown form: {text[:120]!r}")


def _mesh_groups(axes: dict[str, int], chosen: list[tuple[str, str, str]]) -> list[list[int]]:
    """Return the groups along axes, or along parts of them.

    Args:
      axes: sizes by name, in the mesh's order.
      chosen: (name, size before the part, size of the part); empty texts for a whole axis.
    """
    shape, along = [], {}
    for name, total in axes.items():
        parts = [(int(before), int(n)) for axis, before, n in chosen if axis == name and before]
        if not parts and any(axis == name for axis, _, _ in chosen):
            parts = [(1, total)]
        done = 1
        for before, n in sorted(parts):
            if before > done:
                shape.append(before // done)
            along[len(shape)] = None
            shape.append(n)
            done = before * n
        if done < total:
            shape.append(total // done)
    others = [i for i in range(len(shape)) if i not in along]
    ids = np.arange(math.prod(shape)).reshape(shape).transpose(*others, *along)
    return ids.reshape(-1, math.prod(shape[i] for i in along)).tolist()
