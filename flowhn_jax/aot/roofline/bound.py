"""The bound of a compiled train step: its least time by category, and what it moves."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flowhn_jax.aot.collectives import Transfer, transfers
from flowhn_jax.aot.hlo import Instruction, Program
from flowhn_jax.aot.roofline.categories import CATEGORIES, category
from flowhn_jax.aot.roofline.pallas_schedule import Kernel, kernel_of
from flowhn_jax.aot.roofline.rates import Rates
from flowhn_jax.aot.roofline.timeline import Entry, Timeline
from flowhn_jax.aot.roofline.work import Work, Workload
from flowhn_jax.aot.topology import Topology
from flowhn_jax.bench.source_lines import ProgramText

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device is not a type to the checker

_HEAVIEST = 10


class Part(NamedTuple):
    """A category's part of a step, per device.

    Attributes:
      milliseconds: bound of its time.
      flops_milliseconds: the time of its products alone, at the peak.
      gigabytes: moved to and from main memory, with the padding of tiles.
    """

    milliseconds: float
    flops_milliseconds: float
    gigabytes: float


class HeavyOperation(NamedTuple):
    """All instructions of one source line and operation.

    Attributes:
      milliseconds: bound of their time per step.
      count: executions per step.
      limit: what determines the time of the longest: 'flops', 'bytes', 'vector' or 'vmem' (a TPU's
        vector units and loads), 'schedule' (a Pallas kernel's bundles) or 'links'.
      gigabytes: moved to and from main memory.
      category: the category of the table.
      operation: such as 'backward/dot_general'.
      source: file and line; for the instructions that XLA added, of their user.
    """

    milliseconds: float
    count: int
    limit: str
    gigabytes: float
    category: str
    operation: str
    source: str


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of a step on one device.

    Attributes:
      parts: by category, in the order of the table.
      heaviest: operations with the most time.
      model_flops_milliseconds: the time of the model's FLOPs at the device's peak: the ideal.
      overlapped_gigabytes: part of the bytes that asynchronous copies and collectives move.
      link_milliseconds: the time of all collectives, one after the other.
      kernels_by_schedule: whether there are Pallas kernels, all priced by their static schedules;
        other kernels are priced by their FLOPs and bytes.
    """

    parts: dict[str, Part]
    heaviest: list[HeavyOperation]
    model_flops_milliseconds: float
    overlapped_gigabytes: float
    link_milliseconds: float
    kernels_by_schedule: bool

    @property
    def milliseconds(self) -> float:
        """The bound of the step's time."""
        return sum(part.milliseconds for part in self.parts.values())

    @property
    def mfu(self) -> float:
        """The largest MFU that the program allows, in 0..1."""
        return self.model_flops_milliseconds / self.milliseconds

    @property
    def gigabytes(self) -> float:
        """What the step moves to and from main memory."""
        return sum(part.gigabytes for part in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the bound for JSON."""
        return {
            "milliseconds": self.milliseconds,
            "mfu_bound": self.mfu,
            "model_flops_milliseconds": self.model_flops_milliseconds,
            "gigabytes": self.gigabytes,
            "overlapped_gigabytes": self.overlapped_gigabytes,
            "link_milliseconds": self.link_milliseconds,
            "kernels_by_schedule": self.kernels_by_schedule,
            "parts": {name: part._asdict() for name, part in self.parts.items()},
            "heaviest": [each._asdict() for each in self.heaviest],
        }


def pallas_kernels(program: Program) -> list[Kernel]:
    """Return the Pallas kernels of a program for TPUs, each once."""
    found = (
        kernel_of(instruction, instructions)
        for instructions in program.computations.values()
        for instruction in instructions.values()
    )
    return list(dict.fromkeys(kernel for kernel in found if kernel is not None))


def bound(
    text: str,
    rates: Rates,
    model_flops: float,
    *,
    schedules: Mapping[Kernel, float] | None = None,
    links: "tuple[Topology, Sequence[Device]] | None" = None,
) -> Bound:
    """Return the bound of a scheduled program.

    Args:
      text: the text of the program.
      rates: the device's.
      model_flops: the model's FLOPs per step and device.
      schedules: seconds of Pallas kernels by their schedules; others are priced by FLOPs and bytes.
      links: the topology and its devices in the mesh's order; None: collectives take no time.
    """
    source = ProgramText(text)
    program, workload = source.program, Workload(source.program)
    schedules = schedules or {}

    def price(computation: str, instruction: Instruction, work: Work) -> tuple[float, str]:
        seconds = rates.times(work)
        kernel = kernel_of(instruction, program.computations[computation])
        if kernel is not None and kernel in schedules:
            seconds["schedule"] = schedules[kernel]
        limit = max(seconds, key=seconds.__getitem__)
        return seconds[limit], limit

    sent: Mapping[tuple[str, str], Transfer] = {}
    if links is not None:
        sent = transfers(program, links[1], links[0])
    entries = Timeline(program, workload, price, sent).entries()
    names = {
        (entry.computation, entry.instruction.name): category(
            entry,
            source.files(entry.instruction.name),
            only_moves=workload.only_moves(entry.computation, entry.instruction),
        )
        for entry in entries
    }
    by_category = [names[entry.computation, entry.instruction.name] for entry in entries]
    runs, kernels = program.runs(), pallas_kernels(program)
    return Bound(
        parts=_parts(entries, by_category, rates),
        heaviest=_heaviest(entries, by_category, source),
        model_flops_milliseconds=1e3 * model_flops / rates.flops,
        overlapped_gigabytes=sum(x.count * x.work.moved for x in entries if x.work.is_async) / 1e9,
        link_milliseconds=1e3 * sum(runs[name] * each.seconds for (name, _), each in sent.items()),
        kernels_by_schedule=bool(kernels) and all(kernel in schedules for kernel in kernels),
    )


def _parts(entries: Sequence[Entry], by_category: Sequence[str], rates: Rates) -> dict[str, Part]:
    totals = {name: [0.0, 0.0, 0.0] for name in CATEGORIES}
    for entry, name in zip(entries, by_category, strict=True):
        total = totals[name]
        total[0] += 1e3 * entry.count * entry.seconds
        total[1] += 1e3 * entry.count * entry.work.flops / rates.flops
        total[2] += entry.count * entry.work.moved / 1e9
    return {name: Part(*total) for name, total in totals.items()}


def _heaviest(
    entries: Sequence[Entry], by_category: Sequence[str], source: ProgramText
) -> list[HeavyOperation]:
    groups: dict[tuple[str, str, str], list[Entry]] = collections.defaultdict(list)
    for entry, name in zip(entries, by_category, strict=True):
        origin = source.origin(entry.instruction.name)
        groups[name, origin.operation or entry.instruction.opcode, origin.source].append(entry)
    heavy = [
        HeavyOperation(
            milliseconds=1e3 * sum(x.count * x.seconds for x in group),
            count=sum(x.count for x in group),
            limit=max(group, key=lambda x: x.count * x.seconds).limit,
            gigabytes=sum(x.count * x.work.moved for x in group) / 1e9,
            category=name,
            operation=operation,
            source=line,
        )
        for (name, operation, line), group in groups.items()
    ]
    return sorted(heavy, key=lambda each: -each.milliseconds)[:_HEAVIEST]
