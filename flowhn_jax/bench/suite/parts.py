"""The parts of the suite, their order and their shares of the minutes."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Part:
    """One question that the suite answers.

    Attributes:
      name: its key in suite.json.
      title: its heading in suite.md.
      module: the module with its `plan` and `measure`.
      share: of the remaining time, relative to the shares of the parts still to come, which also
        get the time that it does not use.
      least: seconds below which starting it is not worthwhile; its time goes to the other parts.
      is_timed: whether it measures time; if so, a CPU's programs allocate memory as in train.py.
      environment: variables of its worker process, which JAX reads when it starts.
    """

    name: str
    title: str
    module: str
    share: float
    least: float = 0.0
    is_timed: bool = True
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


# A worker's share of a GPU's memory: nearly all of it for the largest batches, but only what it
# uses when PyTorch is measured on the same GPU.
_MAX_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
_SHARED_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def _part(
    name: str,
    title: str,
    share: float,
    least: float,
    *,
    is_timed: bool = True,
    environment: Mapping[str, str] = _MAX_MEMORY,
    module: str | None = None,
) -> Part:
    module = f"{__package__}.{module or name}"
    return Part(name, title, module, share, least, is_timed, environment)


PARTS = (
    _part("machine", "The machine", 3, 20),
    _part("accuracy", "Kernels against float64", 32, 15, is_timed=False),
    _part("compilation", "Train steps compiled in advance", 106, 15, is_timed=False),
    _part("training", "Training speed", 60, 30, module="training_speed"),
    _part(
        "kernel_speed",
        "Kernels against floors and peers",
        38,
        20,
        environment=_SHARED_MEMORY,
    ),
    _part("step_costs", "Where a train step's time goes", 13, 20),
    _part("inference", "Prefill and decoding", 11, 20),
    _part("tiles", "Tile sizes of the Triton scans", 5, 5),
    _part("learning", "200 steps in bfloat16 and in float32", 13, 30),
)
