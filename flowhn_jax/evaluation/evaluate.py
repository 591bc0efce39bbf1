"""`evaluate`: what eval.py does in each of its modes."""

import dataclasses
import inspect
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flowhn_jax import models
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.parameters import LATEST, load_params
from flowhn_jax.config import Config, MeshConfig
from flowhn_jax.data.open import open_data, open_prepared, open_tokenizer
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.evaluation import by_position as positions
from flowhn_jax.evaluation import generate as generation
from flowhn_jax.evaluation import perplexity, recall
from flowhn_jax.evaluation import tasks as tasks_lib
from flowhn_jax.evaluation.prompt_files import read_prompts
from flowhn_jax.evaluation.sampling import Sampling
from flowhn_jax.evaluation.scoring import Scorer
from flowhn_jax.models import Params
from flowhn_jax.parallel.distributed import is_first
from flowhn_jax.parallel.mesh import check_sequence, make_mesh
from flowhn_jax.report.table import print_result
from kernels import backends


class Trained(NamedTuple):
    """A model from a workdir."""

    config: Config
    params: Params
    mesh: Mesh
    workdir: str

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the run's data."""
        return open_tokenizer(self.config, self.workdir)


def evaluate(
    config: Config | None,
    workdir: str | None,
    mode: str,
    checkpoint: str | None = None,
    *,
    of_recipes: Mapping[str, Callable[..., dict[str, Any]]] = types.MappingProxyType({}),
    **options: Any,
) -> None:
    """Prints a table and, as the last line, one JSON object.

    Args:
      config: what the workdir was trained with; where it names no data, the run's own are taken.
        None: the run's own, over all devices' `data`.
      workdir: folder of the run; None: none, for a mode of `of_recipes`.
      mode: one of MODES or of `of_recipes`.
      checkpoint: of the run, as of `load_params`; None: the latest.
      of_recipes: modes that need a recipe but no trained model; functions of a config and a mesh.
      **options: those of the mode's function, by name.

    Raises:
      ValueError, FileNotFoundError: the flags, the files and the workdir do not fit together.
    """
    check_options(mode, options, {**MODES, **of_recipes})
    if config is None:
        if workdir is None:
            raise ValueError("--config, a recipe, or --workdir, the folder of a run, is missing.")
        config = dataclasses.replace(workdir_lib.read_config(workdir), mesh=MeshConfig())
    mesh = make_mesh(config.mesh, perplexity.eval_batch_size(config))
    config = workdir_lib.with_recorded_share(workdir, config)
    check_sequence(config.model, mesh)
    if mode in of_recipes:
        if checkpoint is not None:
            raise ValueError(f"--checkpoint goes with the other modes; {mode} reads none.")
        result = of_recipes[mode](config, mesh, **options)
    else:
        if workdir is None:
            raise ValueError(f"--mode={mode} needs --workdir, the folder of a trained run.")
        workdir_lib.check_model(workdir, config)
        if not config.data.path:
            config = dataclasses.replace(config, data=workdir_lib.read_config(workdir).data)
        with jax.set_mesh(mesh), backends.use(config.kernels.backend):
            params = load_params(workdir, config.model, mesh, checkpoint or LATEST)
            result = MODES[mode](Trained(config, params, mesh, workdir), **options)
    if is_first():
        print_result(result, _SHOWN.intersection(result))


def check_options(
    mode: str, options: Mapping[str, Any], modes: Mapping[str, Callable[..., Any]]
) -> None:
    """Raises ValueError where an option is not the mode's; the message names the modes it is of."""
    for name in options:
        of_modes = [each for each, run in modes.items() if name in _options_of(run)]
        if mode not in of_modes:
            raise ValueError(f"--{name} goes with --mode={' or '.join(of_modes)}, not with {mode}.")


def _options_of(run: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(run).parameters.values()
    return [each.name for each in parameters if each.kind == inspect.Parameter.KEYWORD_ONLY]


def _perplexity(
    trained: Trained,
    *,
    data: str | None = None,
    stride: int | None = None,
    context: int | None = None,
    by_position: bool = False,
    first_token: str = "auto",
) -> dict[str, Any]:
    """Of the run's validation set, of another prepared set, or of a text file."""
    config, params, mesh, workdir = trained
    is_text = data is not None and not pathlib.Path(data).is_dir()
    for name, value in (("stride", stride), ("context", context)):
        if value is not None and not is_text:
            raise ValueError(f"--{name} goes with --data, the text file to score.")
    context = config.model.context if context is None else context
    if not is_text:
        prepared = _prepared(trained, data, first_token)
        source = f"{prepared.folder} (validation)"
        batches = perplexity.validation(config, mesh, prepared)
        text_bytes, words = prepared.splits["validation"].bytes, None
    else:
        source, text = data, _read_text(data)
        stride = context if stride is None else stride
        tokenizer = trained.tokenizer.beginning_with(first_token)
        windows = perplexity.windows_of(config, text, tokenizer, context, stride)
        batches = perplexity.placed(windows, mesh)
        text_bytes, words = len(text), perplexity.count_words(text)
    result = {"data": source, "context": context, "stride": context if stride is None else stride}
    if by_position:
        curve = positions.measure(config, params, batches)
        quality = curve.quality(text_bytes)
        if is_first():
            print(positions.write(curve, config.model.name, workdir))
    else:
        eval_step = perplexity.make_eval_step(config)
        quality = perplexity.evaluate(eval_step, params, batches, text_bytes)
    return result | quality.to_dict(words)


def _prepared(trained: Trained, data: str | None, first_token: str) -> PreparedSet:
    """The set in the folder `data`, or the run's own; of the run's tokens in either case."""
    config, tokenizer = trained.config, trained.tokenizer.beginning_with(first_token)
    if data is None and not config.data.path and tokenizer.spec != "bytes":
        raise ValueError(
            f"{trained.workdir!r} holds a model without data; --data names a text file or a "
            "prepared set to score."
        )
    found = open_data(config, trained.workdir) if data is None else open_prepared(config, data)
    if found.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"The prepared set {found.folder} has another tokenizer ({found.tokenizer_spec}) than "
            f"the run in {trained.workdir!r} ({tokenizer.spec}); accepted is a set of the run's."
        )
    if found.first_token != tokenizer.first_token:
        raise ValueError(
            f"The documents of the prepared set {found.folder} begin with {found.first_token}, not "
            f"{tokenizer.first_token}; type --first_token={found.first_token}, or give a set "
            f"prepared with --first_token={tokenizer.first_token}"
        )
    return found


def _generate(
    trained: Trained,
    *,
    prompt: str | None = None,
    prompts: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: list[str] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    replan: bool = False,
    first_token: str = "auto",
) -> dict[str, Any]:
    """Continues a prompt, shown as it comes, or each one of a file."""
    if (prompt is None) == (prompts is None):
        raise ValueError("--mode=generate needs --prompt, a text, or --prompts, a file of them.")
    if jax.process_count() > 1:
        raise ValueError(f"--mode=generate runs in one process; found {jax.process_count()}.")
    texts = [prompt] if prompts is None else read_prompts(prompts)
    clock = generation.Clock()

    def show(index: int, piece: str) -> None:
        if prompt is not None:
            print(piece, end="", flush=True)

    found = generation.generate(
        trained.config.model,
        trained.params,
        texts,
        tokenizer=trained.tokenizer.beginning_with(first_token),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        stop=stop or (),
        seed=seed,
        batch_size=batch_size,
        replan=replan,
        on_text=show,
        clock=clock,
    )
    if prompt is not None:
        print("\n")
    else:
        for each in found:
            print(f"--- {each.prompt}\n{each.text}\n")
    ended = sum(each.finish == "context" for each in found)
    if ended:
        print(
            f"{ended} of {len(found)} ended with the context of {trained.config.model.context} "
            f"tokens that {trained.config.model.name} was planned for; --replan goes on in a new "
            "window"
        )
    alone = prompt is not None
    return {
        "prompts": len(found),
        "text": found[0].text if alone else [each.text for each in found],
        "finish": found[0].finish if alone else [each.finish for each in found],
        "tokens": sum(each.tokens for each in found),
        "tokens_per_second": clock.tokens_per_second,
    }


def _tasks(
    trained: Trained,
    *,
    tasks: str | None = None,
    task_dir: str | None = None,
    first_token: str = "auto",
) -> Any:
    """Accuracy on downstream tasks."""
    if tasks is None or task_dir is None:
        raise ValueError(
            f"--mode=tasks needs --tasks, of {', '.join(tasks_lib.TASKS)}, and --task_dir, the "
            "folder of their files."
        )
    names = tasks_lib.parse_tasks(tasks)
    tokenizer = trained.tokenizer.beginning_with(first_token)
    results = tasks_lib.evaluate_tasks(_scorer(trained), tokenizer, names, task_dir)
    if is_first():
        print(tasks_lib.table(results))
    return {"task_dir": task_dir, **results}


def _recall(
    trained: Trained, *, lengths: str | None = None, items: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of recalling what stands earlier in the context."""
    config = trained.config.model
    asked = recall.parse_lengths(lengths, config)
    results = recall.measure(
        lambda length: _scorer(trained, length), trained.tokenizer, asked, items, seed
    )
    if is_first():
        print(recall.table(results))
    return {"items": items, "seed": seed, "results": results}


def _scorer(trained: Trained, context: int | None = None) -> Scorer:
    config = trained.config
    if not models.can_decode(config.model):  # a pair would be planned for with its padding
        raise ValueError(
            "split.scope is 'sequence', which plans anew for each length; accepted is 'context'."
        )
    batch_size = perplexity.eval_batch_size(config)
    return Scorer(config.model, trained.params, trained.mesh, batch_size, context=context)


MODES: Mapping[str, Callable[..., dict[str, Any]]] = {
    "perplexity": _perplexity,
    "generate": _generate,
    "tasks": _tasks,
    "recall": _recall,
}


# What a mode prints itself, before the rest.
_SHOWN = frozenset(("text", "results", *tasks_lib.TASKS))


def _read_text(data: str) -> bytes:
    path = pathlib.Path(data)
    if not path.is_file():
        raise FileNotFoundError(
            f"--data is {data!r}; accepted is a text file or the folder of a prepared set."
        )
    return path.read_bytes()
