"""Peak rates of a device, and the least time of an instruction's work."""

import dataclasses
from typing import TYPE_CHECKING

from flowhn_jax import flops
from flowhn_jax.aot.roofline.work import Work

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device is not a type to the checker

# Of a TensorCore per cycle: four vector operations and two loads of a register of 1,024 numbers of
# four bytes, and one store.
_ELEMENTS, _LOADED, _STORED = 4 * 1024, 2 * 4096, 4096


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peak rates of a device; per second.

    Attributes:
      flops: FLOP/s of matrix products in bfloat16.
      bandwidth: bytes of main memory.
      clock: cycles of a TPU; None for others, of which vector operations are not priced.
      cores: TensorCores of a TPU device.
    """

    flops: float
    bandwidth: float
    clock: float | None = None
    cores: int = 1

    def times(self, work: Work) -> dict[str, float]:
        """Return the seconds that the work needs of each resource that could limit it."""
        seconds = {"flops": work.flops / self.flops, "bytes": work.moved / self.bandwidth}
        if self.clock is not None:
            cycles = self.clock * self.cores
            seconds["vector"] = work.vector / _ELEMENTS / cycles
            seconds["vmem"] = max(work.loaded / _LOADED, work.stored / _STORED) / cycles
        return seconds


def of_device(device: "Device") -> Rates | None:
    """Return the rates of a device; None where its peaks are unknown, such as for CPUs."""
    peak, bandwidth = flops.peak_flops(device), flops.peak_bandwidth(device)
    if peak is None or bandwidth is None:
        return None
    return Rates(peak, bandwidth, *(flops.tensor_cores(device) or (None, 1)))
