"""What a trained model of a comparison is scored on after its last step, kept in its folder."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.files import latest_step
from flowhn_jax.checkpoints.parameters import load_params
from flowhn_jax.compare.speed import is_number
from flowhn_jax.compare.training_data import CORPUS, recall_length
from flowhn_jax.compare.training_data import RECALL as RECALL_SET
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.evaluation import by_position, recall
from flowhn_jax.evaluation.perplexity import eval_batch_size, validation
from flowhn_jax.evaluation.scoring import Scorer
from flowhn_jax.models import Params
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.storage import place
from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import short_path
from kernels import backends

Scores = dict[str, float | None]

FILE = "scores.json"
END_LOSS = "end_of_context_loss"
RECALL = "recall_accuracy"
KEYS = (END_LOSS, RECALL)
_END_SHARE = 8  # the last of this many parts of the context is its end
_QUESTIONS = 200  # per recall task
_SEED = 0  # of the questions


def read(folder: str) -> Scores:
    """Return the scores in a run's folder, each None where it was not measured.

    Raises:
      ValueError: they are damaged.
    """
    path = place(folder) / FILE
    if not path.is_file():
        return dict.fromkeys(KEYS)
    try:
        found = json_text.loads(path.read(), repr(str(path)))
        scores = {key: found[key] for key in KEYS}
        is_valid = all(value is None or is_number(value) for value in scores.values())
    except (ValueError, TypeError, KeyError):
        scores, is_valid = {}, False
    if not is_valid:
        raise ValueError(
            f"{short_path(str(path))} is damaged; remove it, and compare again to score the run."
        )
    return scores


def score_missing(
    configs: Mapping[str, Config], workdir: str, describe: Callable[[str], None]
) -> Iterator[str]:
    """Score the runs in the workdir that are trained to their end and have no scores yet.

    Args:
      configs: the configs of the runs, by name.
      workdir: the folder of the comparison.
      describe: is called with what is done next.

    Yields:
      The name of each run that was scored.
    """
    for name, config in configs.items():
        folder = place(workdir) / name
        is_trained = latest_step(str(folder)) == config.train.steps
        if is_trained and not (folder / FILE).is_file():
            describe(f"scoring {name}")
            score(str(folder))
            yield name


def score(folder: str) -> None:
    """Score the newest checkpoint of the run in a folder, and write the scores there."""
    config = workdir_lib.read_config(folder)
    mesh = make_mesh(config.mesh, eval_batch_size(config))
    with jax.set_mesh(mesh), backends.use(config.kernels.backend):
        params = load_params(folder, config.model, mesh)
        data = open_data(config, folder)
        sets = {each.name: each.prepared for each in data.training}
        corpus = sets.get(CORPUS, data.main)
        curve = by_position.measure(config, params, validation(config, mesh, corpus))
        accuracy = None
        if RECALL_SET in sets:
            accuracy = _recall(config, params, mesh, data.tokenizer)
    scores = {END_LOSS: end_of_context(curve), RECALL: accuracy}
    (place(folder) / FILE).write_whole(json.dumps(scores) + "\n")


def _recall(config: Config, params: Params, mesh: Mesh, tokenizer: Tokenizer) -> float:
    """Return the share of right answers, mean over the recall tasks."""
    model, length = config.model, recall_length(config.model.context)
    scorer = Scorer(model, params, mesh, eval_batch_size(config), context=length)
    found = recall.measure(lambda _: scorer, tokenizer, [length], _QUESTIONS, _SEED)
    return statistics.fmean(each["accuracy"] for each in found)


def end_of_context(curve: by_position.Curve) -> float | None:
    """Return the mean loss, in nats per token, of the targets late in a window of one document.

    These have at least 7/8 of the context before them; None if there are none.
    """
    count = len(curve.nll)
    late = slice(count - max(1, count // _END_SHARE), None)
    targets = int(np.sum(curve.targets[late]))
    return float(np.sum(curve.nll[late])) / targets if targets else None
