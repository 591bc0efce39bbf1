"""Speed of training between two rows of metrics."""

import time

from jax.sharding import Mesh

from flowhn_jax import flops
from flowhn_jax.checkpoints.rows import Row
from flowhn_jax.config import Config


class Speedometer:
    """Times the steps between two rows of metrics."""

    def __init__(self, config: Config):
        batch, context = config.train.batch_size, config.model.context
        self._tokens_per_step = batch * context
        self._flops_per_step = batch * flops.train_flops(config.model, context)
        self._dense_flops_per_step = batch * flops.train_flops(config.model, context, causal=False)
        self.restart()

    def restart(self) -> None:
        """Start counting steps and seconds from zero."""
        self._steps = 0
        self._start = time.perf_counter()

    def count_step(self) -> None:
        """Count a step that was dispatched."""
        self._steps += 1

    def read(self, step: int, mesh: Mesh) -> Row:
        """Return the speed since `restart`; call it when the devices have finished all steps."""
        seconds = (time.perf_counter() - self._start) / self._steps
        devices = mesh.size
        flops_per_device = self._flops_per_step / seconds / devices
        dense_flops_per_device = self._dense_flops_per_step / seconds / devices
        device = mesh.devices.flat[0]
        return {
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": self._tokens_per_step / seconds,
            "tokens_per_second_per_device": self._tokens_per_step / seconds / devices,
            "tflops_per_second_per_device": flops_per_device / 1e12,
            "mfu": flops.utilisation(flops_per_device, device),
            "mfu_palm": flops.utilisation(dense_flops_per_device, device),
            "step_seconds": seconds,
            "time": time.time(),
        }
