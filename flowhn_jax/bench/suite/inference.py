"""Part `inference`: prefill and decode speed of every model, for the recipe's batch and for one."""

import functools
import statistics
from collections.abc import Iterator

from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.suite.workload import MODELS, Earlier, recipe, sizes
from flowhn_jax.bench.throughput import random_state, summary, time_inference
from flowhn_jax.parallel.mesh import make_mesh

_REPEATS = 5


def plan() -> list[str]:
    """Return SIZE/MODEL for each model of the first size."""
    return [f"{sizes()[0]}/{model}" for model in MODELS]


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield the rows."""
    for key in missing:
        size, _, model = key.partition("/")
        labels = {"key": key, "size": size, "model": model}
        yield attempt(labels, functools.partial(_measure, size, model))


def _measure(size: str, model: str) -> Row:
    config = recipe(size, model)
    mesh = make_mesh(config.mesh, config.train.batch_size)
    params = random_state(config, mesh).params
    seconds = time_inference(config, mesh, params, _REPEATS)
    row: Row = {"batch_size": config.train.batch_size, "context": config.model.context}
    for name, each in seconds.items():
        row |= summary(name, each, config, mesh)
    return row | {
        "first_token_seconds": statistics.median(seconds["prefill_one"]),
        "summary": f"prefill {row['prefill_tokens_per_second']:,.0f}, decode "
        f"{row['decode_tokens_per_second']:,.0f} tokens/s",
    }
