"""Compare published models with transformers: `python tools/published.py`.

A file of tests/data/published has the keys of one published config.json, with small sizes. A model
of that config, with random parameters, is saved by transformers, imported here, compared, exported
and loaded by transformers again. The command prints the results as a table; it needs torch.
"""

import copy
import dataclasses
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flowhn_jax import models  # noqa: E402
from flowhn_jax.checkpoints.optimizer import make_optimizer  # noqa: E402
from flowhn_jax.checkpoints.state import TrainState  # noqa: E402
from flowhn_jax.config import Config, ModelConfig, TrainConfig  # noqa: E402
from flowhn_jax.interop import huggingface, state_spaces  # noqa: E402
from flowhn_jax.parallel.mesh import make_mesh  # noqa: E402
from flowhn_jax.training.step import make_train_step  # noqa: E402

FOLDER = ROOT / "tests" / "data" / "published"
TOLERANCE = 3e-5  # of logits, as a share of the largest
_LENGTH, _PROMPT = 24, 6


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model in a small size.

    Attributes:
      name: the name of its file.
      source: the repository that it was published in.
      config: the keys of its config.json.
    """

    name: str
    source: str
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How an imported model compares with transformers.

    Attributes:
      error: the largest difference of logits, as a share of the largest logit.
      same_text: whether both continue a prompt with the same most probable tokens.
      exported_error: as `error`, for the logits of the exported model in transformers.
      loss: the loss of a train step.
      still: the parameters that the train step does not change.
    """

    error: float
    same_text: bool
    exported_error: float
    loss: float
    still: tuple[str, ...]

    @property
    def trains(self) -> bool:
        """Whether the train step's loss is finite and all parameters change."""
        return bool(np.isfinite(self.loss)) and not self.still


def published() -> list[Published]:
    """Return all published models, sorted by name."""
    files = sorted(FOLDER.glob("*.json"))
    return [Published(path.stem, **json.loads(path.read_text())) for path in files]


def save_random(config: dict[str, Any], folder: pathlib.Path) -> Any:
    """Save a model of transformers with random parameters, and return it.

    All parameters are random, also those that are constant in a new model, such as norms and
    biases. The folder's config.json is the published one.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    is_original = state_spaces.is_original(config)
    keys = state_spaces.to_hf_config(config) if is_original else copy.deepcopy(config)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**keys), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    if is_original:
        save_original(theirs, folder)
    else:
        theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


def save_original(theirs: Any, folder: pathlib.Path, **options: Any) -> None:
    """Save the parameters of transformers' Mamba or Mamba-2 as Mamba's authors do.

    Args:
      theirs: the model.
      folder: is created if it does not exist.
      options: the options of torch.save.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    new, old = "backbone.embeddings.", "backbone.embedding."
    arrays = {name.replace(new, old): tensor for name, tensor in theirs.state_dict().items()}
    torch.save(arrays, folder / "pytorch_model.bin", **options)


def compare(config: dict[str, Any], folder: pathlib.Path) -> Comparison:
    """Return how a published config compares, with files in the empty folder.

    Raises:
      ValueError: the config is not supported.
    """
    theirs = save_random(config, folder / "theirs")
    ours, params = huggingface.load(folder / "theirs")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, ours.vocab_size, (2, _LENGTH))
    expected = _their_logits(theirs, tokens)
    found = np.asarray(models.forward(ours, params, tokens))
    count = min(_LENGTH, ours.max_length or _LENGTH) - _PROMPT
    prompts = tokens[:, :_PROMPT]
    our_text = _our_text(ours, params, prompts, count)
    same_text = np.array_equal(our_text, _their_text(theirs, prompts, count))
    huggingface.save(folder / "ours", ours, params)
    exported = _load_theirs(folder / "ours")
    loss, still = _train_step(ours, params, tokens)
    return Comparison(
        error=_error(found, expected),
        same_text=same_text,
        exported_error=_error(_their_logits(exported, tokens), expected),
        loss=loss,
        still=still,
    )


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _load_theirs(folder: pathlib.Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def _their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def _their_text(model: Any, prompts: np.ndarray, count: int) -> np.ndarray:
    """Return `count` most probable tokens after each prompt."""
    import torch
    import transformers

    settings = transformers.GenerationConfig(
        do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0
    )
    ids = torch.tensor(prompts)
    model.generation_config = settings  # without the ids that would end a text
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return found[:, prompts.shape[1] :].numpy()


def _our_text(
    config: ModelConfig, params: models.Params, prompts: np.ndarray, count: int
) -> np.ndarray:
    """Return `count` most probable tokens after each prompt."""
    length = prompts.shape[1] + count
    logits, cache = models.prefill(config, params, prompts, length=length)
    found = [logits.argmax(-1)]
    while len(found) < count:
        logits, cache = models.step(config, params, found[-1], cache)
        found.append(logits.argmax(-1))
    return np.stack(found, axis=1)


def _train_step(
    config: ModelConfig, params: models.Params, tokens: np.ndarray
) -> tuple[float, tuple[str, ...]]:
    """Return the loss of a train step, and the parameters that it does not change."""
    run = Config(config, train=TrainConfig(batch_size=len(tokens), learning_rate=1e-2, warmup=0.0))
    before = jax.device_get(params)
    mesh = make_mesh(run.mesh, 1, jax.devices()[:1])
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    state = TrainState(zeros[0], params, make_optimizer(run.train).init(params), *zeros[1:])
    batch = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.ones_like(tokens)}
    with jax.set_mesh(mesh):
        state, metrics = make_train_step(run, mesh)(state, batch)
    after = jax.device_get(state.params)
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    still = [jax.tree_util.keystr(path) for (path, x), y in pairs if np.array_equal(x, y)]
    return float(metrics["loss"]), tuple(still)


def main() -> None:
    """Print the table."""
    print("| Published as | Loads | Error of logits | Greedy text | Exported again | Trains |")
    print("|---|---|---|---|---|---|")
    for model in published():
        with tempfile.TemporaryDirectory() as folder:
            found = compare(model.config, pathlib.Path(folder))
        text = "same" if found.same_text else "differs"
        print(
            f"| {model.source} | yes | {found.error:.1e} | {text} | {found.exported_error:.1e} "
            f"| {'yes' if found.trains else 'no'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
