"""The bound of a config's train step on a machine, compiled for it without the machine."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from flowhn_jax import flops
from flowhn_jax.aot.hlo import Program
from flowhn_jax.aot.roofline import rates as rates_lib
from flowhn_jax.aot.roofline.bound import Bound, bound, pallas_kernels
from flowhn_jax.aot.roofline.pallas_schedule import kernel_seconds
from flowhn_jax.aot.step_plan import plan
from flowhn_jax.aot.topology import Topology
from flowhn_jax.config import Config
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.parallel.mesh import check_sequence, make_mesh


@dataclasses.dataclass(frozen=True)
class StepBound:
    """A train step on a topology, and its bound.

    Attributes:
      name: the name of the model's strategy or kind.
      topology: name of the machine.
      mesh: sizes of the mesh's axes.
      sequences: per step, over all chips.
      context: tokens of a sequence.
      options: XLA's compiler options that were asked for.
      memory: bytes per chip of arguments, results and temporaries.
      memory_limit: bytes per chip that are available.
      ideal_gigabytes: fewest that a chip can move, `flops.train_bytes`.
      bound: the bound of the step.
    """

    name: str
    topology: str
    mesh: dict[str, int]
    sequences: int
    context: int
    options: dict[str, str]
    memory: int
    memory_limit: int
    ideal_gigabytes: float
    bound: Bound

    def to_dict(self) -> dict[str, Any]:
        """Return the step and its bound for JSON."""
        fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        return fields | {"jax": jax.__version__, "bound": self.bound.to_dict()}


def step_bound(
    config: Config, topology: Topology, options: Mapping[str, str] | None = None
) -> StepBound:
    """Plan the train step of a config for a topology and return its bound.

    Args:
      config: the config of the run; its mesh is laid over the topology's devices.
      topology: the machine.
      options: XLA's compiler options, next to those of the train step.

    Raises:
      ValueError: mesh, batch and devices do not match.
      RuntimeError: XLA cannot compile the step; its message.
    """
    model = config.model
    mesh = make_mesh(config.mesh, eval_batch_size(config), topology.devices)
    check_sequence(model, mesh)
    rates = rates_lib.of_device(topology.devices[0])
    assert rates is not None  # the chips of all topologies are known
    planned = plan(config, topology.name, topology.slices, options)
    schedules = {}
    if rates.clock is not None:
        kernels = pallas_kernels(Program(planned.text))
        schedules = kernel_seconds(kernels, topology.name, rates.clock)
    step_flops = config.train.batch_size * flops.train_flops(model, model.context)
    found = bound(
        planned.text,
        rates,
        step_flops / mesh.size,
        schedules=schedules,
        links=(topology, list(mesh.devices.flat)),
    )
    with jax.set_mesh(mesh):  # it determines the dtype of products
        ideal = flops.train_bytes(
            model,
            config.train.batch_size,
            model.context,
            devices=mesh.size,
            tensor=mesh.shape["tensor"],
        )
    return StepBound(
        name=model.name,
        topology=topology.name,
        mesh=dict(mesh.shape),
        sequences=config.train.batch_size,
        context=model.context,
        options=dict(options or {}),
        memory=planned.main_memory,
        memory_limit=topology.chip.memory,
        ideal_gigabytes=ideal / 1e9,
        bound=found,
    )
