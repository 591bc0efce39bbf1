"""Profile of a compiled program: the time of each of its instructions, and their source lines.

`profile` runs the program under JAX's profiler and joins the trace, read by `device_trace`, with
the program's text, read by `source_lines`.

On one device the costs of a step add up to its busy time. On a GPU the kernels of several streams
overlap, so the sum may exceed the step's time. On a CPU the sum is in thread-seconds, at most the
step's time multiplied by XLA's threads; if these outnumber the cores, waiting for a core counts
too. Asynchronous transfers of a TPU count only while the core waits for them.
"""

import collections
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.profiler import ProfileData

from flowhn_jax.bench.device_trace import Line, executions_of, read_trace
from flowhn_jax.bench.source_lines import ProgramText


@dataclasses.dataclass(frozen=True)
class Cost:
    """Device time of an instruction, or of a group of them, in one step."""

    name: str  # of the HLO instruction, or of the kernel if the program has no such instruction
    seconds: float  # per step, mean over the local devices
    share: float  # of the sum of all costs
    count: int  # executions per step and device; on a GPU its kernels' launches
    source: str  # 'flowhn_jax/layers/mamba1.py:88'; empty if unknown
    operation: str  # 'forward/dot_general'; empty if unknown


def profile(run: Callable[[], Any], text: str, steps: int = 3) -> list[Cost]:
    """Return the costs of one step of a compiled program, the largest first.

    A program from JAX's persistent cache has the source lines that it was compiled from.

    Args:
      run: executes the program once and returns arrays that depend on it. It is called once before
        the trace and `steps` times during it.
      text: the program's `jax.stages.Compiled.as_text()`.
      steps: the number of calls that the costs are averaged over.

    Raises:
      ValueError: `steps` is less than 1, or `text` is not a program's.
      RuntimeError: the trace has no device events of the program.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}.")
    jax.block_until_ready(run())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python calls would make up most of a CPU's trace
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                jax.block_until_ready(run())
        lines = [
            line
            for path in sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
            for line in read_trace(ProfileData.from_file(str(path)))
        ]
    return costs_of(lines, text, steps)


def largest(costs: Iterable[Cost], count: int = 10) -> list[Cost]:
    """Return the `count` largest costs by source line and operation, the largest first.

    The instructions of one line and operation, e.g. one per layer, are summed. The sum is named
    after the largest of them, such as 'fusion.12 and 5 more'.
    """
    groups: dict[tuple[str, ...], list[Cost]] = collections.defaultdict(list)
    for cost in _sorted(costs):
        known = cost.source or cost.operation
        groups[(cost.source, cost.operation) if known else ("", "", cost.name)].append(cost)
    sums = [
        dataclasses.replace(
            group[0],
            name=group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else ""),
            seconds=sum(cost.seconds for cost in group),
            share=sum(cost.share for cost in group),
            count=sum(cost.count for cost in group),
        )
        for group in groups.values()
    ]
    return _sorted(sums)[:count]


def _sorted(costs: Iterable[Cost]) -> list[Cost]:
    return sorted(costs, key=lambda cost: -cost.seconds)


def costs_of(lines: Sequence[Line], text: str, steps: int) -> list[Cost]:
    """Return the costs of one step from a trace of `steps` of them; see `profile`."""
    program = ProgramText(text)
    executions = executions_of(lines)
    nanoseconds: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    instructions: dict[str, str | None] = {}
    for execution in executions:
        instruction = program.find(execution.module, execution.names)
        name = instruction
        if name is None:
            is_other = execution.module not in (None, program.module)
            name = f"{execution.module}/" * is_other + execution.names[-1]
        nanoseconds[name] += execution.nanoseconds
        counts[name] += execution.launches
        instructions[name] = instruction
    if all(instruction is None for instruction in instructions.values()):
        modules = {execution.module for execution in executions if execution.module}
        others = ", ".join(sorted(modules - {program.module}))
        raise RuntimeError(
            f"`run` must execute the program of `text`, {program.module}, on a device; the trace "
            f"has {f'only events of {others}' if others else 'no device events'}."
        )
    per_step = steps * len({execution.device for execution in executions})
    total = sum(nanoseconds.values()) or 1.0
    return _sorted(
        Cost(
            name,
            seconds=time / per_step / 1e9,
            share=time / total,
            count=max(1, round(counts[name] / per_step)),
            **program.origin(instructions[name])._asdict(),
        )
        for name, time in nanoseconds.items()
    )
