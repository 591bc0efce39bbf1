"""Validation of a run while it trains."""

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from flowhn_jax.checkpoints.rows import Row
from flowhn_jax.config import Config
from flowhn_jax.data.lookahead import Lookahead
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.run_data import RunData
from flowhn_jax.evaluation.perplexity import (
    Quality,
    count_validation_batches,
    make_eval_step,
    mean_quality,
    validate,
    validation,
)
from flowhn_jax.models import Params
from flowhn_jax.models.loss import Batch
from flowhn_jax.training.console import Console

ShouldStop = Callable[[Lookahead[Batch]], bool]


@dataclasses.dataclass(frozen=True)
class Scores:
    """The quality of the parameters of a run.

    Attributes:
      overall: on the validation set; for a mixture the weighted mean over its sets.
      named: on each set that has results of its own, by name.
    """

    overall: Quality
    named: dict[str, Quality]

    def to_row(self, *, ema: bool = False) -> Row:
        """Return the results by their keys in a row of metrics; with `ema`, by the average's."""
        loss, bits = (f"validation_{'ema_' * ema}{name}" for name in ("loss", "bits_per_byte"))
        row = {loss: self.overall.nll, bits: self.overall.bits_per_byte}
        row |= {f"{loss}/{name}": each.nll for name, each in self.named.items()}
        return row | {f"{bits}/{name}": each.bits_per_byte for name, each in self.named.items()}


class Validator:
    """Scores parameters on a run's validation sets, or on `train.eval_windows` windows of each."""

    def __init__(self, config: Config, mesh: Mesh, data: RunData, console: Console):
        self._config, self._mesh, self._data = config, mesh, data
        self._console = console
        self._eval_step = make_eval_step(config)
        self._max_windows = config.train.eval_windows or None

    def score(self, params: Params, should_stop: ShouldStop) -> Scores | None:
        """Return the quality of `params`; None if the run is to stop first.

        Args:
          params: the parameters of the model, laid over the mesh.
          should_stop: asked before each batch, with the batches, which are read ahead.
        """
        found: list[Quality] = []
        for each in self._data.training + self._data.validation:
            quality = self._score_set(each.prepared, params, should_stop)
            if quality is None:
                return None
            found.append(quality)
        names = [each.name for each in self._data.training + self._data.validation]
        named = {name: each for name, each in zip(names, found, strict=True) if name}
        trained = found[: len(self._data.training)]
        weights = [each.weight for each in self._data.training]
        return Scores(mean_quality(weights, trained), named)

    def _score_set(
        self, prepared: PreparedSet, params: Params, should_stop: ShouldStop
    ) -> Quality | None:
        """Return the quality on one set; None if the run is to stop first."""
        batches = Lookahead(validation(self._config, self._mesh, prepared, self._max_windows))
        should_stop(batches)  # all processes know of an error in the first batches one call later
        if should_stop(batches):
            return None
        count = count_validation_batches(self._config, prepared, self._max_windows)
        with self._console.validating(count) as progress:

            def after_batch() -> bool:
                progress.update()
                return should_stop(batches)

            return validate(
                self._config,
                self._mesh,
                self._eval_step,
                params,
                prepared,
                self._max_windows,
                stops=after_batch,
                batches=batches,
            )
