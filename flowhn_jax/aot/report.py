"""A train step compiled for a topology: does it fit, what does it send, what does that cost."""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from flowhn_jax import flops, models
from flowhn_jax.aot.collectives import Traffic, traffic
from flowhn_jax.aot.hlo import Program
from flowhn_jax.aot.memory import Memory, memory
from flowhn_jax.aot.program import CODE, plan
from flowhn_jax.aot.topology import GIB, Topology
from flowhn_jax.bench.largest_batch import Attempt
from flowhn_jax.bench.largest_batch import largest_batch as search
from flowhn_jax.checkpoints.state import abstract_state
from flowhn_jax.config import Config
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.parallel.mesh import check_sequence, make_mesh
from flowhn_jax.training.step import abstract_batch, lower_train_step
from kernels import backends
from kernels.partition import AXES

# How libtpu says that a program does not fit; the larger figure is what it needs.
_OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available|Used ([\d.]+)([KMGT]) of")


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known of a step on a topology. Per chip and per step, in bytes and seconds.

    Attributes:
      memory: None where the compiler found that the step does not fit.
      needed: bytes that it needs or, where it was not compiled, its temporaries alone.
      traffic: by kind of collective; empty where it was not compiled.
      compute_seconds: of the step's model FLOPs at the assumed MFU.
      is_plan: whether no machine code was made.
    """

    topology: Topology
    mesh: dict[str, int]
    strategy: str
    parameters: int
    context: int
    sequences: int  # a step's, of all chips
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
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool:
        """Whether a chip's memory holds it."""
        return self.memory is not None and self.needed <= self.topology.chip.memory

    @property
    def communication_seconds(self) -> float:
        """Of all collectives, one after the other."""
        return sum(each.seconds for each in self.traffic.values())

    @property
    def communication_share(self) -> float:
        """Of a step in which nothing is sent while anything is computed."""
        return self.communication_seconds / (self.communication_seconds + self.compute_seconds)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
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
        """For people."""
        chip, axes = self.topology.chip, [f"{name}={n}" for name, n in self.mesh.items() if n > 1]
        slices = f" x {self.topology.slices} slices" if self.topology.slices > 1 else ""
        lines = [
            f"{self.parameters:,} parameters; {self.strategy}, context {self.context:,}",
            f"{self.topology.name}{slices}: {self.chips} chips, mesh {', '.join(axes) or 'of one'};"
            f" {self.sequences} sequences a step, {self.sequences / self.chips:g} a chip",
            f"{'planned' if self.is_plan else 'compiled'} in {self.compile_seconds:.1f} s; "
            f"{self.kernels}",
            "",
            f"{'memory of a chip':<24}{'GiB':>8}",
        ]
        if self.memory is None:
            lines.append(f"{'temporaries alone':<24}{self.needed / GIB:>8.2f}")
        else:
            parts = {**dataclasses.asdict(self.memory), "total": self.memory.total}
            lines += [f"{name:<24}{held / GIB:>8.2f}" for name, held in parts.items()]
        verdict = "fits" if self.fits else "does not fit"
        lines.append(f"{'there are':<24}{chip.memory / GIB:>8.2f}  it {verdict}")
        if self.memory is None:
            return "\n".join(lines)
        lines += ["", f"{'collectives of a step':<24}{'count':>8}{'MiB a chip':>12}{'ms':>9}"]
        for kind, each in sorted(self.traffic.items()):
            received, milliseconds = each.received / 2**20, 1e3 * each.seconds
            lines.append(f"{kind:<24}{each.count:>8,}{received:>12,.1f}{milliseconds:>9.2f}")
        lines += [
            f"{'all':<24}{'':>20}{1e3 * self.communication_seconds:>9.2f}",
            "",
            f"{self.step_flops:.3g} FLOPs a step, {self.step_flops / self.chips:.3g} a chip: "
            f"{1e3 * self.compute_seconds:.2f} ms at an MFU of {self.mfu:.2f}",
            f"communication is {100 * self.communication_share:.1f} % of the step if none of it "
            "is hidden behind computing",
        ]
        return "\n".join(lines)


def report(
    config: Config, topology: Topology, mfu: float = 0.5, *, plan_only: bool = False
) -> Report:
    """Compiles the train step of a config for a topology.

    Args:
      config: the run's; its mesh takes the topology's devices.
      topology: the machine.
      mfu: share of the chips' peak assumed of a step without communication.
      plan_only: whether to end where the program and its memory are planned, for TPUs.

    Raises:
      ValueError: mesh, batch and devices do not fit each other, or GPUs are to be planned only.
    """
    if plan_only and topology.is_gpu:
        raise ValueError("--plan_only is for TPUs; programs for GPUs are compiled whole.")
    model, devices = config.model, topology.devices
    mesh = make_mesh(config.mesh, eval_batch_size(config), devices)
    check_sequence(model, mesh)
    peak = flops.peak_flops(devices[0])
    step_flops = config.train.batch_size * flops.train_flops(model, model.context)
    start = time.perf_counter()
    needed, held, sent = 0, None, {}
    with jax.set_mesh(mesh), backends.use(config.kernels.backend), backends.record() as chosen:
        lowered = lower_train_step(config, mesh)
        try:
            if plan_only:
                text, data = plan(config, topology.name, topology.slices)
                code = CODE
            else:
                text, data, code = _compile(lowered)
        except RuntimeError as error:
            needed = _needed(error)
        else:
            program = Program(text)
            arguments = abstract_state(config, mesh), abstract_batch(config, mesh)
            held = memory(program, *arguments, data, code)
            needed = held.total
            sent = traffic(program, list(mesh.devices.flat), topology)
    return Report(
        topology=topology,
        mesh=dict(mesh.shape),
        strategy=model.name,
        parameters=models.param_count(model),
        context=model.context,
        sequences=config.train.batch_size,
        kernels=backends.describe(chosen),
        compile_seconds=time.perf_counter() - start,
        memory=held,
        needed=needed,
        traffic=sent,
        step_flops=step_flops,
        mfu=mfu,
        compute_seconds=step_flops / mesh.size / peak / mfu,
        is_plan=plan_only,
    )


def _compile(lowered: jax.stages.Lowered) -> tuple[str, int, int]:
    """The program's text, bytes of its data, and of its code."""
    compiled = lowered.compile()
    sizes = compiled.memory_analysis()
    arguments = sizes.argument_size_in_bytes
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    data = arguments + results + sizes.temp_size_in_bytes
    return compiled.as_text(), data, sizes.generated_code_size_in_bytes


def _needed(error: RuntimeError) -> int:
    """Bytes that a program needs which does not fit; another error is raised again."""
    found = _OUT_OF_MEMORY.search(str(error))
    if found is None:
        raise error
    figure, unit = (a or b for a, b in zip(found.groups()[:2], found.groups()[2:], strict=True))
    return int(float(figure) * 1024 ** (1 + "KMGT".index(unit)))


def largest_batch(config: Config, topology: Topology, **options: Any) -> Report:
    """Return the report of the most sequences per chip, of powers of two, that fit.

    `options` are those of `report`; the search is `evaluation.largest_batch`'s, from the config's
    batch on.

    Raises:
      ValueError: not even one sequence for each of the devices that share the batch fits.
    """
    mesh = make_mesh(config.mesh, 0, topology.devices)  # for any batch
    parts = math.prod(mesh.shape[name] for name in AXES["B"]) * config.train.accumulate

    def attempt(each: int) -> Attempt[Report]:
        train = dataclasses.replace(config.train, batch_size=each * parts)
        found = report(dataclasses.replace(config, train=train), topology, **options)
        if found.memory is None:
            return Attempt(found, fits=False)
        temporaries = found.memory.activations + found.memory.temporaries
        return Attempt(found, found.fits, found.memory.total - temporaries, temporaries)

    start = max(1, config.train.batch_size // parts)
    try:
        return search(attempt, start, topology.chip.memory).result
    except ValueError as error:
        raise ValueError(
            f"No batch fits {topology.name}: a step of {parts} sequences, one for each device that "
            f"shares the batch, needs more than {topology.chip.memory / GIB:.2f} GiB per chip."
        ) from error
