"""`evaluate`: what eval.py does in each of its modes."""

import dataclasses
import pathlib
from typing import Any

import jax

from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.evaluation import perplexity, throughput
from flowhn_jax.parallel.distributed import is_first
from flowhn_jax.parallel.mesh import check_sequence, make_mesh
from flowhn_jax.report.table import print_result
from flowhn_jax.training import workdir as workdir_lib
from flowhn_jax.training.checkpoint import load_params
from kernels import backends


def evaluate(
    config: Config,
    workdir: str | None,
    mode: str,
    *,
    data: str | None = None,
    stride: int | None = None,
    repeats: int = 10,
) -> None:
    """Prints a table and, as the last line, one JSON object.

    Args:
      config: what the workdir was trained with; where it names no data, the run's own are taken.
      workdir: folder of the run; throughput does without.
      mode: 'perplexity' or 'throughput'.
      data: text file to score; None: the run's validation set.
      stride: tokens between the windows of a text; None: the context.
      repeats: timed repeats of throughput.

    Raises:
      ValueError, FileNotFoundError: the flags, the files and the workdir do not fit together.
    """
    mesh = make_mesh(config.mesh, perplexity.eval_batch_size(config))
    config = workdir_lib.settle_balance(workdir, config)
    check_sequence(config.model, mesh)
    if stride is not None and data is None:
        raise ValueError("--stride goes with --data, the text file to score.")
    if mode == "throughput":
        if data is not None:
            raise ValueError("--data goes with --mode=perplexity; throughput takes random tokens.")
        _print(throughput.measure(config, mesh, repeats))
        return
    if workdir is None:
        raise ValueError(f"--mode={mode} needs --workdir, the folder of a trained run.")
    workdir_lib.check_model(workdir, config)
    if not config.data.path:
        config = dataclasses.replace(config, data=workdir_lib.read_config(workdir).data)
    prepared = open_data(config, workdir)
    context = config.model.context
    with jax.set_mesh(mesh), backends.use(config.kernels.backend):
        params = load_params(workdir, config.model, mesh)
        eval_step = perplexity.make_eval_step(config)
        if data is None:
            source, stride = f"{prepared.folder} (validation)", context
            quality = perplexity.validate(config, mesh, eval_step, params, prepared)
        else:
            source, stride = data, context if stride is None else stride
            text, tokenizer = _read_text(data), prepared.tokenizer
            quality = perplexity.score_text(
                config, mesh, eval_step, params, text, tokenizer, stride
            )
    _print({"data": source, "context": context, "stride": stride, **quality.to_dict()})


def _print(result: dict[str, Any]) -> None:
    if is_first():
        print_result(result)


def _read_text(data: str) -> bytes:
    path = pathlib.Path(data)
    if not path.is_file():
        raise FileNotFoundError(f"--data is {data!r}; accepted is a text file.")
    return path.read_bytes()
