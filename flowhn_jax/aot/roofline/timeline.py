"""A step's instructions in scheduled order: how long each takes, and what waits for links."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from flowhn_jax.aot.collectives import Transfer
from flowhn_jax.aot.hlo import Instruction, Program
from flowhn_jax.aot.roofline.work import COLLECTIVES, Work, Workload, call_target

Price = Callable[[str, Instruction, Work], tuple[float, str]]


class Entry(NamedTuple):
    """An instruction's executions in a step.

    Attributes:
      computation: the computation that the instruction is in.
      instruction: for a wait the one that waits.
      count: executions per step.
      work: the work of each execution.
      seconds: the seconds of each execution; 0 for asynchronous ones.
      limit: what determines the seconds: 'flops', 'bytes', 'vector', 'vmem', 'schedule' or 'links'.
    """

    computation: str
    instruction: Instruction
    count: int
    work: Work
    seconds: float
    limit: str


class Timeline:
    """Runs the schedule of a program, one instruction after the other, next to two queues.

    One queue holds the collectives that are executed asynchronously, one the copies: each begins
    when it is started and the queue is empty, and what it has not finished when its result is
    needed is exposed. Copies have the whole bandwidth of the memory. Queues are empty at the start
    of every computation, such as the body of a loop. Of a conditional's branches the fastest runs.
    """

    def __init__(
        self,
        program: Program,
        workload: Workload,
        price: Price,
        transfers: Mapping[tuple[str, str], Transfer],
    ):
        """Prepare a run.

        Args:
          program: whose schedule is run.
          workload: the workload of the program.
          price: returns the seconds of a computation's instruction with this work, and what limits
            them.
          transfers: time of the links by computation and instruction.
        """
        self._program = program
        self._workload = workload
        self._price = price
        self._transfers = transfers

    def entries(self) -> list[Entry]:
        """Return what a step executes."""
        return self._run(self._program.entry)

    def _run(self, computation: str) -> list[Entry]:
        entries: list[Entry] = []
        now = 0.0
        free = {"links": 0.0, "bytes": 0.0}  # when each queue is empty
        ends: dict[str, tuple[float, str]] = {}  # of what is in flight, and its queue
        for instruction in self._program.computations[computation].values():
            inner = self._called(computation, instruction)
            if inner:
                entries += inner
                now += sum(entry.count * entry.seconds for entry in inner)
                continue
            work = self._workload.of(computation, instruction)
            key, phase, seconds = self._collective(computation, instruction)
            queue = "links"
            if work is not None and work.is_async and not phase:
                key, phase, queue = instruction.name, "start", "bytes"
                seconds = self._price(computation, instruction, work)[0]
            if phase == "start":
                free[queue] = max(now, free[queue]) + seconds
                ends[key] = free[queue], queue
            if work is not None:
                price = 0.0, queue
                if phase in ("", "amid"):
                    price = self._price(computation, instruction, work)
                entries.append(Entry(computation, instruction, 1, work, *price))
                now += price[0]
            if phase == "done" and key in ends:
                end, queue = ends.pop(key)
                seconds, phase = max(0.0, end - now), "whole"
            if phase == "whole" and seconds:
                entries.append(Entry(computation, instruction, 1, Work(), seconds, queue))
                now += seconds
        return entries

    def _called(self, computation: str, instruction: Instruction) -> list[Entry]:
        """Return what a loop, a call or a conditional executes."""
        if instruction.opcode not in ("while", "call", "conditional"):
            return []
        branches = [
            [entry._replace(count=times * entry.count) for entry in self._run(name)]
            for name, times in self._program.called(computation, instruction)
        ]
        return min(branches, key=lambda each: sum(x.count * x.seconds for x in each))

    def _collective(self, computation: str, instruction: Instruction) -> tuple[str, str, float]:
        """Return the key of a collective, which part of it an instruction executes, and its time.

        The part is 'start', 'amid' or 'done' of an asynchronous one, 'whole' of others, and empty
        for what is no collective. The time is 0 but for 'start' and 'whole'.
        """
        opcode = instruction.opcode
        if opcode.endswith("-done"):
            return instruction.operands[0], "done", 0.0
        within = self._workload.fused(computation, instruction)
        collective, place = instruction, computation
        targets: set[str] = set()
        if within is not None:
            inside = self._program.computations[within].values()
            found = next((x for x in inside if x.opcode in COLLECTIVES), None)
            if found is None:
                return "", "", 0.0
            collective, place = found, within
            targets = {call_target(x) for x in inside}
        elif opcode.removesuffix("-start") not in COLLECTIVES:
            return "", "", 0.0
        transfer = self._transfers.get((place, collective.name))
        seconds = 0.0 if transfer is None else transfer.seconds
        chain = re.search(r'chain_id="(\d+)"', collective.attributes)
        if opcode.endswith("-start"):
            return instruction.name, "start", seconds
        if chain is None:
            return "", "whole", seconds
        key = f"chain {chain[1]}"
        if "AsyncCollectiveStart" in targets:
            return key, "start", seconds
        return key, "done" if "AsyncCollectiveDone" in targets else "amid", 0.0
