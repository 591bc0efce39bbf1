"""The modes of eval.py."""

import dataclasses
import inspect
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
from flowhn_jax.data.run_data import RunData
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.evaluation import by_position as positions
from flowhn_jax.evaluation import generate as generation
from flowhn_jax.evaluation import perplexity, recall, set_scores
from flowhn_jax.evaluation import tasks as tasks_lib
from flowhn_jax.evaluation.prompt_files import read_prompts
from flowhn_jax.evaluation.sampling import Sampling
from flowhn_jax.evaluation.scoring import Scorer
from flowhn_jax.models import Params
from flowhn_jax.parallel.distributed import is_first
from flowhn_jax.parallel.mesh import check_sequence, make_mesh
from flowhn_jax.report.table import print_result
from flowhn_jax.storage import place
from flowhn_jax.utils.progress import progress
from flowhn_jax.utils.text import short_path
from kernels import backends

Result = dict[str, Any]

# Measures a config on a mesh, without trained parameters. Keyword-only parameters are its options.
Benchmark = Callable[..., Result]


class TrainedModel(NamedTuple):
    """A model restored from a workdir."""

    config: Config
    params: Params
    mesh: Mesh
    workdir: str

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run's data."""
        return open_tokenizer(self.config, self.workdir)


def evaluate(
    config: Config | None,
    workdir: str | None,
    mode: str,
    checkpoint: str | None = None,
    ema: bool = False,
    *,
    benchmarks: Mapping[str, Benchmark] = types.MappingProxyType({}),
    **options: Any,
) -> None:
    """Evaluate in one mode; print a table and, as the last line, one JSON object.

    Args:
      config: what the workdir was trained with; if it names no data, the run's own data are used.
        None: the run's own config, with all devices on the mesh's `data` axis.
      workdir: folder of the run; a benchmark needs none.
      mode: a name in MODES or `benchmarks`.
      checkpoint: the checkpoint of the run, as in `load_params`; None: the latest.
      ema: whether to use the average of the parameters, as in `load_params`.
      benchmarks: further modes, which measure a config without trained parameters.
      **options: options of the mode, by name.

    Raises:
      ValueError, FileNotFoundError: the options, the files and the workdir do not fit together.
    """
    check_options(mode, options, {**MODES, **benchmarks})
    if config is None:
        if workdir is None:
            raise ValueError(
                "Give --config, the name or file of a recipe, or --workdir, the folder of a run."
            )
        config = dataclasses.replace(workdir_lib.read_config(workdir), mesh=MeshConfig())
    mesh = make_mesh(config.mesh, perplexity.eval_batch_size(config))
    config = workdir_lib.with_recorded_share(workdir, config)
    check_sequence(config.model, mesh)
    if mode in benchmarks:
        if checkpoint is not None or ema:
            flag = "--checkpoint" if checkpoint is not None else "--ema"
            raise ValueError(
                f"{flag} cannot be used with --mode={mode}, which reads no checkpoint."
            )
        result = benchmarks[mode](config, mesh, **options)
    else:
        if workdir is None:
            raise ValueError(f"--mode={mode} needs --workdir, the folder of a trained run.")
        workdir_lib.check_model(workdir, config)
        if not config.data.path:
            config = dataclasses.replace(config, data=workdir_lib.read_config(workdir).data)
        with jax.set_mesh(mesh), backends.use(config.kernels.backend):
            params = load_params(workdir, config.model, mesh, checkpoint or LATEST, ema)
            result = MODES[mode](TrainedModel(config, params, mesh, workdir), **options)
    if is_first():
        print_result(result, _PRINTED_BY_MODES.intersection(result))


def check_options(
    mode: str, options: Mapping[str, Any], modes: Mapping[str, Callable[..., Any]]
) -> None:
    """Raise ValueError if an option does not belong to the mode; name the modes it belongs to."""
    for name in options:
        owners = [each for each, function in modes.items() if name in _options_of(function)]
        if mode not in owners:
            raise ValueError(
                f"--{name} is an option of --mode={' and '.join(owners)}; it has no effect with "
                f"--mode={mode}."
            )


def _options_of(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind == inspect.Parameter.KEYWORD_ONLY]


def _perplexity(
    trained: TrainedModel,
    *,
    data: str | None = None,
    stride: int | None = None,
    context: int | None = None,
    by_position: bool = False,
    first_token: str = "auto",
) -> Result:
    """Score the run's validation set, another prepared set's, or a text file."""
    config, params, mesh, workdir = trained
    is_set = data is None or place(data).is_dir()
    for name, value in (("stride", stride), ("context", context)):
        if value is not None and is_set:
            raise ValueError(f"--{name} needs --data=FILE, the text file to score.")
    context = config.model.context if context is None else context
    stride = context if stride is None else stride
    words = None
    if data is None or is_set:
        opened = _open_sets(trained, data, first_token)
        if opened.named:
            if by_position:
                folders = ", ".join(str(each.folder) for each in opened.named.values())
                raise ValueError(
                    f"--by_position needs --data, the set to score, for example of {folders}."
                )
            result = set_scores.score_sets(config, params, mesh, opened)
            if is_first():
                print(set_scores.table(result["sets"]))
            return result
        prepared = opened.main
        source = f"{prepared.folder} (validation)"
        batches = perplexity.validation(config, mesh, prepared)
        count = perplexity.count_validation_batches(config, prepared)
        text_bytes = prepared.splits["validation"].bytes
    else:
        source, text = data, _read_text(data)
        tokenizer = trained.tokenizer.beginning_with(first_token)
        text_batches = perplexity.text_batches(config, text, tokenizer, context, stride)
        batches, count = perplexity.place(text_batches, mesh), len(text_batches)
        text_bytes, words = len(text), perplexity.count_words(text)
    batches = progress(batches, "scoring", "batches", total=count)
    if by_position:
        curve = positions.measure(config, params, batches)
        quality = curve.quality(text_bytes)
        if is_first():
            print(positions.write(curve, config.model.name, workdir))
    else:
        eval_step = perplexity.make_eval_step(config)
        quality = perplexity.evaluate(eval_step, params, batches, text_bytes)
        assert quality is not None  # nothing stops it
    return {"data": source, "context": context, "stride": stride} | quality.to_dict(words)


def _open_sets(trained: TrainedModel, data: str | None, first_token: str) -> RunData:
    """Open the prepared set in the folder `data`, or the run's own; check that their tokens fit."""
    config, tokenizer = trained.config, trained.tokenizer.beginning_with(first_token)
    if data is None and not config.data.path and tokenizer.spec != "bytes":
        raise ValueError(
            "--data must name a text file or a prepared set to score, as the model in "
            f"{trained.workdir!r} comes without data."
        )
    if data is None:
        opened = open_data(config, trained.workdir)
    else:
        opened = RunData.of(open_prepared(config, data))
    found = opened.main  # the others have the same tokenizer and first token
    if found.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"The prepared set {found.folder} must have the tokenizer of the run in "
            f"{trained.workdir!r}, {tokenizer.spec}; it has {found.tokenizer_spec}."
        )
    if found.first_token != tokenizer.first_token:
        raise ValueError(
            f"The documents of the prepared set {found.folder} must begin with "
            f"{tokenizer.first_token}; they begin with {found.first_token}. Type "
            f"--first_token={found.first_token}, or use a set prepared with "
            f"--first_token={tokenizer.first_token}"
        )
    return opened


def _generate(
    trained: TrainedModel,
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
) -> Result:
    """Continue a prompt, printed as it is generated, or each prompt in a file."""
    if jax.process_count() > 1:
        raise ValueError(f"--mode=generate must run in one process; got {jax.process_count()}.")
    if prompt is not None and prompts is None:
        texts = [prompt]
    elif prompt is None and prompts is not None:
        texts = read_prompts(prompts)
    else:
        raise ValueError("--mode=generate needs --prompt=TEXT or --prompts=FILE, and not both.")
    is_single = prompt is not None
    clock = generation.Clock()

    def show(index: int, piece: str) -> None:
        if is_single:
            print(piece, end="", flush=True)

    total = len(texts) * max_new_tokens
    with progress(total, "generating", "tokens", enabled=not is_single) as bar:
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
            on_progress=bar.update,
        )
    if is_single:
        print("\n")
    else:
        for each in found:
            print(f"--- {each.prompt}\n{each.text}\n")
    ended = sum(each.finish == "context" for each in found)
    if ended:
        print(
            f"{ended} of {len(found)} texts ended at {trained.config.model.max_length} tokens, the "
            f"context {trained.config.model.name} is planned for. --replan continues in a new "
            "window."
        )
    return {
        "prompts": len(found),
        "text": found[0].text if is_single else [each.text for each in found],
        "finish": found[0].finish if is_single else [each.finish for each in found],
        "tokens": sum(each.tokens for each in found),
        "tokens_per_second": clock.tokens_per_second,
    }


def _tasks(
    trained: TrainedModel,
    *,
    tasks: str | None = None,
    task_dir: str | None = None,
    first_token: str = "auto",
) -> Result:
    """Measure the accuracy on downstream tasks."""
    if tasks is None or task_dir is None:
        raise ValueError(
            f"--mode=tasks needs --tasks, names from {', '.join(tasks_lib.TASKS)}, and --task_dir, "
            "the folder of their files."
        )
    names = tasks_lib.parse_tasks(tasks)
    tokenizer = trained.tokenizer.beginning_with(first_token)
    results = tasks_lib.evaluate_tasks(_scorer(trained), tokenizer, names, task_dir)
    if is_first():
        print(tasks_lib.table(results))
    return {"task_dir": task_dir, **results}


def _recall(
    trained: TrainedModel, *, lengths: str | None = None, items: int = 100, seed: int = 0
) -> Result:
    """Measure the accuracy of recalling facts from earlier in the context."""
    results = recall.measure(
        lambda length: _scorer(trained, length),
        trained.tokenizer,
        recall.parse_lengths(lengths, trained.config.model),
        items,
        seed,
    )
    if is_first():
        print(recall.table(results))
    return {"items": items, "seed": seed, "results": results}


def _scorer(trained: TrainedModel, context: int | None = None) -> Scorer:
    config = trained.config
    if not models.can_decode(config.model):  # the padding of a pair would change its split
        raise ValueError(
            "model.split.scope must be 'context' to score texts of several lengths; got 'sequence'."
        )
    batch_size = perplexity.eval_batch_size(config)
    return Scorer(config.model, trained.params, trained.mesh, batch_size, context=context)


MODES: Mapping[str, Callable[..., Result]] = {
    "perplexity": _perplexity,
    "generate": _generate,
    "tasks": _tasks,
    "recall": _recall,
}

# Results that a mode has already printed.
_PRINTED_BY_MODES = frozenset(("text", "results", "sets", *tasks_lib.TASKS))


def _read_text(data: str) -> bytes:
    path = place(data)
    if not path.is_file():
        raise FileNotFoundError(
            f"--data must be a text file or the folder of a prepared set; {short_path(data)} is "
            "neither."
        )
    return path.read()
