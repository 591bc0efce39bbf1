"""Perplexity of a run that has several validation sets: of each set, and of the mixture."""

from typing import Any

from jax.sharding import Mesh

from flowhn_jax.config import Config
from flowhn_jax.data.run_data import RunData
from flowhn_jax.evaluation import perplexity
from flowhn_jax.models import Params
from flowhn_jax.report.table import markdown
from flowhn_jax.utils.progress import progress


def score_sets(config: Config, params: Params, mesh: Mesh, data: RunData) -> dict[str, Any]:
    """Return the quality on the mixture, and that on each named set under 'sets'."""
    eval_step = perplexity.make_eval_step(config)
    scores: list[perplexity.Quality] = []
    for each in data.training + data.validation:
        count = perplexity.count_validation_batches(config, each.prepared)
        batches = perplexity.validation(config, mesh, each.prepared)
        shown = progress(batches, f"scoring {each.name}".strip(), "batches", total=count)
        text_bytes = each.prepared.splits["validation"].bytes
        quality = perplexity.evaluate(eval_step, params, shown, text_bytes)
        assert quality is not None  # nothing stops it
        scores.append(quality)
    overall = perplexity.mean_quality(
        [each.weight for each in data.training], scores[: len(data.training)]
    )
    names = [each.name for each in data.training + data.validation]
    source = ", ".join(str(each.prepared.folder) for each in data.training)
    return {
        "data": f"{source} (validation)",
        "context": config.model.context,
        "stride": config.model.context,
        **overall.to_dict(),
        "sets": {name: each.to_dict() for name, each in zip(names, scores, strict=True) if name},
    }


def table(sets: dict[str, dict[str, Any]]) -> str:
    """Return the qualities of the named sets as a table."""
    rows = [
        [name, f"{each['nll']:.4f}", f"{each['bits_per_byte']:.4f}", f"{each['tokens']:,}"]
        for name, each in sets.items()
    ]
    return markdown(["set", "nll", "bits/byte", "tokens"], rows)
