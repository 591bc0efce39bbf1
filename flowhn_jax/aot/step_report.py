"""Report on a train step compiled for a topology: memory, collectives and their time."""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from flowhn_jax import flops, models
from flowhn_jax.aot.collectives import Traffic, traffic
from flowhn_jax.aot.hlo import Program
from flowhn_jax.aot.step_memory import Memory, memory
from flowhn_jax.aot.step_plan import CODE_BYTES, plan
from flowhn_jax.aot.topology import GIB, Topology
from flowhn_jax.bench.largest_batch import Attempt, NoBatchFitsError
from flowhn_jax.bench.largest_batch import largest_batch as search
from flowhn_jax.bench.throughput import memory_sizes, program_bytes
from flowhn_jax.checkpoints.state import abstract_state
from flowhn_jax.config import Config
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.parallel.mesh import check_sequence, make_mesh
from flowhn_jax.report.table import markdown
from flowhn_jax.training.step import abstract_batch, lower_train_step
from kernels import backends
from kernels.partition import AXES

# libtpu's messages about a program that does not fit, with the bytes that it needs.
_OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available|Used ([\d.]+)([KMGT]) of")


@dataclasses.dataclass(frozen=True)
class Report:
    """A train step on a topology. Bytes and seconds are per chip and per step.

    Attributes:
      sequences: per step, over all chips.
      memory: None if the compiler finds that the step does not fit.
      needed: bytes that the step needs; if it was not compiled, those of its temporaries alone.
      traffic: by kind of collective; empty if the step was not compiled.
      compute_seconds: time of the step's model FLOPs at the assumed MFU.
      is_plan: whether no machine code was generated.
    """

    topology: Topology
    mesh: dict[str, int]
    strategy: str
    parameters: int
    context: int
    sequences: int
    kernels: str
    compile_seconds: float
    memory: Memory | None
    needed: int
    traffic: dict[str, Traffic]
    step_flops: int
    mfu: float
    compute_seconds: float
    is_plan: bool

    @property
    def chips(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool:
        """Whether the step fits in a chip's memory."""
        return self.memory is not None and self.needed <= self.topology.chip.memory

    @property
    def communication_seconds(self) -> float:
        """Time of all collectives, one after the other."""
        return sum(each.seconds for each in self.traffic.values())

    @property
    def communication_share(self) -> float:
        """Share of the step's time that is communication, if nothing overlaps with computation."""
        return self.communication_seconds / (self.communication_seconds + self.compute_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        by_kind = None if self.memory is None else dataclasses.asdict(self.memory)
        return {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "chips": self.chips,
            "mesh": self.mesh,
            "strategy": self.strategy,
            "parameters": self.parameters,
            "context": self.context,
            "sequences": self.sequences,
            "kernels": self.kernels,
            "jax": jax.__version__,
            "compile_seconds": self.compile_seconds,
            "plan_only": self.is_plan,
            "fits": self.fits,
            "memory": by_kind,
            "memory_needed": self.needed,
            "memory_limit": self.topology.chip.memory,
            "collectives": {kind: each._asdict() for kind, each in self.traffic.items()},
            "communication_seconds": self.communication_seconds,
            "communication_share": self.communication_share,
            "flops": self.step_flops,
            "flops_per_chip": self.step_flops / self.chips,
            "assumed_mfu": self.mfu,
            "compute_seconds": self.compute_seconds,
        }

    def __str__(self) -> str:
        """Return the report as text."""
        axes = [f"{name}={n}" for name, n in self.mesh.items() if n > 1]
        slices = f" x {self.topology.slices} slices" if self.topology.slices > 1 else ""
        lines = [
            f"{self.parameters:,} parameters; {self.strategy}, context {self.context:,}",
            f"{self.topology.name}{slices}: {self.chips} chips, mesh "
            f"{', '.join(axes) or 'of one device'}; {self.sequences} sequences per step, "
            f"{self.sequences / self.chips:g} per chip",
            f"{'planned' if self.is_plan else 'compiled'} in {self.compile_seconds:.1f} s; "
            f"{self.kernels}",
            "",
            self._memory_table(),
            f"the step {'fits' if self.fits else 'does not fit'}",
        ]
        if self.memory is not None:
            lines += [
                "",
                self._traffic_table(),
                "",
                f"{self.step_flops:.3g} FLOPs per step, {self.step_flops / self.chips:.3g} per "
                f"chip: {1e3 * self.compute_seconds:.2f} ms at an MFU of {self.mfu:.2f}",
                f"communication is {100 * self.communication_share:.1f} % of the step if none of "
                "it overlaps with computing",
            ]
        return "\n".join(lines)

    def _memory_table(self) -> str:
        if self.memory is None:
            rows = {"temporaries alone": self.needed}
        else:
            rows = {**dataclasses.asdict(self.memory), "total": self.memory.total}
        rows["available"] = self.topology.chip.memory
        table = [[name, f"{count / GIB:.2f}"] for name, count in rows.items()]
        return markdown(["memory per chip", "GiB"], table)

    def _traffic_table(self) -> str:
        table = [
            [kind, f"{each.count:,}", f"{each.received / 2**20:,.1f}", f"{1e3 * each.seconds:.2f}"]
            for kind, each in sorted(self.traffic.items())
        ]
        table.append(["all", "", "", f"{1e3 * self.communication_seconds:.2f}"])
        return markdown(["collectives per step", "count", "MiB per chip", "ms"], table)


def report(
    config: Config, topology: Topology, mfu: float = 0.5, *, plan_only: bool = False
) -> Report:
    """Compile the train step of a config for a topology and return the report.

    Args:
      config: the config of the run; its mesh is laid over the topology's devices.
      topology: the machine.
      mfu: assumed MFU of a step without communication.
      plan_only: whether to stop when the program and its memory are planned; TPUs only.

    Raises:
      ValueError: mesh, batch and devices do not match, or `plan_only` is set for GPUs.
    """
    if plan_only and topology.is_gpu:
        raise ValueError(
            f"--plan_only needs a --topology of TPUs, e.g. v5e:4x4; got {topology.name}."
        )
    model, devices = config.model, topology.devices
    mesh = make_mesh(config.mesh, eval_batch_size(config), devices)
    check_sequence(model, mesh)
    peak = flops.peak_flops(devices[0])
    assert peak is not None  # the chips of all topologies are known
    step_flops = config.train.batch_size * flops.train_flops(model, model.context)
    start = time.perf_counter()
    needed, by_kind, received = 0, None, {}
    with jax.set_mesh(mesh), backends.use(config.kernels.backend), backends.record() as chosen:
        lowered = lower_train_step(config, mesh)
        try:
            if plan_only:
                text, data = plan(config, topology.name, topology.slices)
                code = CODE_BYTES
            else:
                text, data, code = _compile(lowered)
        except RuntimeError as error:
            needed = _needed(error)
        else:
            program = Program(text)
            arguments = abstract_state(config, mesh), abstract_batch(config, mesh)
            by_kind = memory(program, *arguments, data, code)
            needed = by_kind.total
            received = traffic(program, list(mesh.devices.flat), topology)
    return Report(
        topology=topology,
        mesh=dict(mesh.shape),
        strategy=model.name,
        parameters=models.param_count(model),
        context=model.context,
        sequences=config.train.batch_size,
        kernels=backends.describe(chosen),
        compile_seconds=time.perf_counter() - start,
        memory=by_kind,
        needed=needed,
        traffic=received,
        step_flops=step_flops,
        mfu=mfu,
        compute_seconds=step_flops / mesh.size / peak / mfu,
        is_plan=plan_only,
    )


def _compile(lowered: jax.stages.Lowered) -> tuple[str, int, int]:
    """Return the program's text, the bytes of its data and those of its code."""
    compiled = lowered.compile()
    code = memory_sizes(compiled).generated_code_size_in_bytes
    return compiled.as_text() or "", program_bytes(compiled), code


def _needed(error: RuntimeError) -> int:
    """Return the bytes needed by a program that does not fit; raise any other error again."""
    found = _OUT_OF_MEMORY.search(str(error))
    if found is None:
        raise error
    figure, unit = (a or b for a, b in zip(found.groups()[:2], found.groups()[2:], strict=True))
    return int(float(figure) * 1024 ** (1 + "KMGT".index(unit)))


def largest_batch(
    config: Config, topology: Topology, mfu: float = 0.5, *, plan_only: bool = False
) -> Report:
    """Return the report of the largest power of two of sequences per chip that fits.

    The other arguments are those of `report`. The search, `bench.largest_batch`, starts at the
    config's batch.

    Raises:
      NoBatchFitsError: not even one sequence per device and micro-batch fits.
    """
    mesh = make_mesh(config.mesh, 0, topology.devices)  # for any batch
    parts = math.prod(mesh.shape[name] for name in AXES["B"]) * config.train.accumulate

    def attempt(each: int) -> Attempt[Report]:
        train = dataclasses.replace(config.train, batch_size=each * parts)
        found = report(dataclasses.replace(config, train=train), topology, mfu, plan_only=plan_only)
        if found.memory is None:
            return Attempt(found, fits=False)
        temporaries = found.memory.activations + found.memory.temporaries
        return Attempt(found, found.fits, found.memory.total - temporaries, temporaries)

    start = max(1, config.train.batch_size // parts)
    try:
        return search(attempt, start, topology.chip.memory).result
    except NoBatchFitsError as error:
        raise NoBatchFitsError(
            f"No batch fits {topology.name}: a step of {parts} sequences, one per device and "
            f"micro-batch, needs more than {topology.chip.memory / GIB:.2f} GiB per chip; use a "
            "larger --topology, mesh.fsdp=-1 or train.remat=full."
        ) from error
