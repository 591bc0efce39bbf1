"""Validation of a run while it trains."""

from collections.abc import Callable

from jax.sharding import Mesh

from flowhn_jax.config import Config
from flowhn_jax.data.lookahead import Lookahead
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.evaluation.perplexity import (
    Quality,
    eval_batch_size,
    make_eval_step,
    validate,
    validation,
)
from flowhn_jax.models import Params
from flowhn_jax.models.loss import Batch
from flowhn_jax.training.console import Console


class Validator:
    """Scores parameters on the run's validation set, or on `train.eval_windows` windows of it."""

    def __init__(self, config: Config, mesh: Mesh, prepared: PreparedSet, console: Console):
        self._config, self._mesh, self._prepared = config, mesh, prepared
        self._console = console
        self._eval_step = make_eval_step(config)
        self._max_windows = config.train.eval_windows or None
        windows = prepared.splits["validation"].windows
        self._windows = min(windows, self._max_windows or windows)

    def score(
        self, params: Params, should_stop: Callable[[Lookahead[Batch]], bool]
    ) -> Quality | None:
        """Return the quality of `params`; None if the run is to stop first.

        Args:
          params: of the model, laid over the mesh.
          should_stop: asked before each batch, with the batches, which are read ahead.
        """
        batches = Lookahead(validation(self._config, self._mesh, self._prepared, self._max_windows))
        should_stop(
            batches
        )  # an error in the first batches; all processes know it in the next call
        if should_stop(batches):
            return None
        count = -(-self._windows // eval_batch_size(self._config))
        with self._console.validating(count) as progress:

            def after_batch() -> bool:
                progress.update()
                return should_stop(batches)

            return validate(
                self._config,
                self._mesh,
                self._eval_step,
                params,
                self._prepared,
                self._max_windows,
                stops=after_batch,
                batches=batches,
            )
