"""Read a profiler's device trace: the executions of a program's instructions.

| device | what is read | what counts as an execution's time |
|---|---|---|
| TPU | line "XLA Ops" of each /device:TPU:N | its time without that of instructions nested in it |
| GPU | lines "Stream #..." of each /device:GPU:N | the time of its kernels and copies |
| CPU | threads of /host:CPU | thread time: the busy time of all threads that compute it |
"""

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jaxlib._jax import ProfileData  # jax.profiler.ProfileData is no type to the checker


class Event(NamedTuple):
    """One event of a trace; times in nanoseconds."""

    name: str
    start: float
    duration: float
    stats: dict[str, Any]

    @property
    def end(self) -> float:
        """The end of the event, in nanoseconds."""
        return self.start + self.duration


class Line(NamedTuple):
    """Events of one thread, stream or core."""

    plane: str
    name: str
    events: Sequence[Event]


class Execution(NamedTuple):
    """Device time of an instruction: one of its executions, or a part of it."""

    device: str
    module: str | None  # None if the trace does not name it
    names: tuple[str, ...]  # of the instruction or its kernel, the most precise first
    nanoseconds: float
    launches: int = 1


def read_trace(data: "ProfileData") -> list[Line]:
    """Return the lines of a trace's device planes and of the host's threads."""
    return [
        Line(
            plane.name,
            line.name,
            [
                Event(event.name, event.start_ns, event.duration_ns, dict(event.stats))
                for event in line.events
            ],
        )
        for plane in data.planes
        if plane.name.startswith(("/device:", "/host:CPU"))
        for line in plane.lines
    ]


def executions_of(lines: Sequence[Line]) -> list[Execution]:
    """Return the executions on TPUs; if there are none, those on GPUs, else those on CPUs."""
    return (
        list(_tpu_executions(lines)) or list(_gpu_executions(lines)) or list(_cpu_executions(lines))
    )


_Interval = tuple[float, float]  # start and end, in nanoseconds


def _nest(spans: Sequence[_Interval]) -> tuple[list[list[_Interval]], list[int | None]]:
    """Return the parts of each span outside the spans nested in it, and the index of its parent.

    If two spans overlap, the common time counts for the later one.
    """
    own: list[list[_Interval]] = [[] for _ in spans]
    parents: list[int | None] = [None] * len(spans)
    done = [start for start, _ in spans]  # where the part of a span that is not yet split begins
    stack: list[int] = []
    for i in sorted(range(len(spans)), key=lambda i: (spans[i][0], -spans[i][1])):
        start, end = spans[i]
        while stack and spans[stack[-1]][1] <= start:
            stack.pop()
        if stack:
            parents[i] = parent = stack[-1]
            if start > done[parent]:
                own[parent].append((done[parent], start))
            done[parent] = max(done[parent], min(end, spans[parent][1]))
        stack.append(i)
    for i, (_, end) in enumerate(spans):
        if end > done[i]:
            own[i].append((done[i], end))
    return own, parents


def _length(intervals: Iterable[_Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _tpu_executions(lines: Iterable[Line]) -> Iterator[Execution]:
    """Yield the executions on TPU cores; events of loops and branches contain their bodies'."""
    lines = [line for line in lines if re.fullmatch(r"/device:TPU:\d+", line.plane)]
    modules = {line.plane: line.events for line in lines if line.name == "XLA Modules"}
    for line in lines:
        if line.name != "XLA Ops":
            continue
        runs = modules.get(line.plane, ())
        events = sorted(line.events, key=lambda event: (event.start, -event.duration))
        spans = [(event.start, event.end) for event in (*runs, *events)]
        own, parents = _nest(spans)
        names: list[str | None] = [re.sub(r"\(\d+\)$", "", run.name) for run in runs]
        for i, event in enumerate(events, len(runs)):
            parent = parents[i]
            names.append(None if parent is None else names[parent])
            # An event's name is the instruction's text: '%fusion.1 = f32[8]{0} fusion(...)'.
            name = event.name.partition(" = ")[0].removeprefix("%")
            yield Execution(line.plane, names[i], (name,), _length(own[i]))


def _gpu_executions(lines: Iterable[Line]) -> Iterator[Execution]:
    """Yield the kernels and copies of GPU streams; other lines repeat their time by other keys."""
    for line in lines:
        if not re.fullmatch(r"/device:GPU:\d+", line.plane) or not line.name.startswith("Stream"):
            continue
        own, _ = _nest([(event.start, event.end) for event in line.events])
        for event, intervals in zip(line.events, own, strict=True):
            instruction = event.stats.get("hlo_op")
            names = (instruction, event.name) if instruction else (event.name,)
            yield Execution(line.plane, event.stats.get("hlo_module"), names, _length(intervals))


# The time of these events is spent waiting for other threads, or scheduling.
_WAIT = re.compile(r"ThunkExecutor::|.*::Await")
_TASK = "ThreadpoolListener::"
# What a thread's time is attributed to: an instruction's event, a task's number, or nothing.
_Owner = Event | int | None


def _cpu_executions(lines: Iterable[Line]) -> Iterator[Execution]:
    """Yield the executions of instructions on a CPU, and of the tasks that they schedule.

    An instruction's event covers the thread that starts it; a task is a region of any thread. A
    task that outlasts its instruction is a worker of a shared pool: from then on its time counts
    for the running instruction with tasks that started last.
    """
    lines = [line for line in lines if line.plane.startswith("/host:CPU")]
    times: list[tuple[_Owner, list[_Interval]]] = []
    schedulers: dict[int, _Owner] = {}
    for line in lines:
        owners, spans, records = _cpu_spans(line)
        own, parents = _nest(spans)
        times += zip(owners, own, strict=True)
        for i, task in records:
            parent = parents[i]
            schedulers[task] = None if parent is None else owners[parent]

    # The marker 'end: NAME' carries the number of the instruction's event.
    ends = {
        event.stats.get("_c"): event.end
        for line in lines
        for event in line.events
        if event.name.startswith("end: ")
    }

    def end_of(event: Event) -> float:
        return max(event.end, ends.get(event.stats.get("_p"), event.end))

    with_tasks = {id(one): one for one in schedulers.values() if isinstance(one, Event)}
    running = sorted(
        ((event.start, end_of(event), event) for event in with_tasks.values()),
        key=lambda one: one[0],
    )
    starts = [start for start, _, _ in running]
    longest = max((end - start for start, end, _ in running), default=0)
    for owner, intervals in times:
        if isinstance(owner, Event):
            yield _cpu_execution(owner, _length(intervals), launches=1)
            continue
        event = _instruction_of(owner, schedulers)
        if event is None:
            continue
        for start, end in intervals:
            split = min(max(start, end_of(event)), end)
            yield _cpu_execution(event, split - start)
            first = bisect.bisect_left(starts, split - longest)
            last = bisect.bisect_left(starts, end)
            for from_, to, other in reversed(running[first:last]):
                overlap = min(to, end) - max(from_, split)
                if overlap > 0:
                    yield _cpu_execution(other, overlap)
                    end = max(from_, split)


def _cpu_execution(event: Event, nanoseconds: float, launches: int = 0) -> Execution:
    stats = event.stats
    device = f"cpu:{stats.get('device_ordinal', 0)}"
    return Execution(device, stats.get("hlo_module"), (stats["hlo_op"],), nanoseconds, launches)


def _cpu_spans(line: Line) -> tuple[list[_Owner], list[_Interval], list[tuple[int, int]]]:
    """Return owners and intervals of a thread's spans, and the index and task of each record.

    A task runs from StartRegion to StopRegion. Its Record lies where the task is scheduled: inside
    an instruction's event, or inside the region of an earlier task.
    """
    owners: list[_Owner] = []
    spans: list[_Interval] = []
    records: list[tuple[int, int]] = []
    regions: list[tuple[float, int | None]] = []  # start and task
    for event in sorted(line.events, key=lambda event: event.start):
        owner, start = None, event.start
        if event.name == _TASK + "StartRegion":
            regions.append((event.start, event.stats.get("_c")))
            continue
        if event.name == _TASK + "StopRegion":
            if not regions:  # the task began before the trace
                continue
            start, owner = regions.pop()
        elif event.name == _TASK + "Record":
            records.append((len(spans), event.stats["_p"]))
        elif "hlo_op" in event.stats:
            owner = event
        elif not _WAIT.match(event.name):
            continue
        owners.append(owner)
        spans.append((start, event.end))
    return owners, spans, records


def _instruction_of(owner: _Owner, schedulers: dict[int, _Owner]) -> Event | None:
    """Return the event of the instruction that scheduled a task, directly or through others."""
    while isinstance(owner, int):
        scheduler = schedulers.get(owner)
        # Task numbers grow with time, so a cycle means that the trace is malformed.
        owner = None if isinstance(scheduler, int) and scheduler >= owner else scheduler
    return owner
