"""Runs to folders of safetensors, and such folders to workdirs that eval.py takes."""

import dataclasses
import pathlib

from flowhn_jax import models
from flowhn_jax.config import Config, MeshConfig
from flowhn_jax.data.open import open_tokenizer, read_tokenizer, write_tokenizer
from flowhn_jax.data.prepared import TOKENIZER
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.interop import huggingface
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training import workdir as workdir_lib
from flowhn_jax.training.parameters import LATEST, load_params, save_params


def export_run(workdir: str, out: str, checkpoint: str = LATEST) -> str:
    """Writes a checkpoint's model to `out`: config.json, safetensors, and its tokenizer.

    The latter is tokenizer.json and tokenizer_config.json; bytes have none. `checkpoint` is as of
    `load_params`.

    Returns:
      A line that says what was written.

    Raises:
      FileNotFoundError: `workdir` holds no run or no checkpoint.
      ValueError: as of `huggingface.save`.
    """
    config = workdir_lib.read_config(workdir)
    mesh = make_mesh(MeshConfig(data=1), 1)
    params = load_params(workdir, config.model, mesh, checkpoint)
    tokenizer = open_tokenizer(config, workdir)
    huggingface.save(out, config.model, params)
    write_tokenizer(out, tokenizer)
    return f"wrote {config.model.name}, {models.param_count(config.model):,} parameters, to {out}"


def import_run(source: str, workdir: str) -> str:
    """Makes a new workdir of a folder as `export_run`, or transformers, writes it.

    Returns:
      A line that says what was read.

    Raises:
      FileNotFoundError, ValueError: as of `huggingface.load`, or `workdir` is not empty.
    """
    path = pathlib.Path(workdir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--workdir is {workdir!r}, which is there; accepted is a new folder.")
    model, params = huggingface.load(source)
    has_tokenizer = (pathlib.Path(source) / TOKENIZER).is_file()
    tokenizer = read_tokenizer(source) if has_tokenizer else load_tokenizer("bytes")
    workdir_lib.make(workdir)
    write_tokenizer(workdir, tokenizer)
    workdir_lib.write_config(workdir, dataclasses.replace(Config(), model=model))
    save_params(workdir, model, params)
    count = models.param_count(model)
    return f"read {model.name}, {count:,} parameters, from {source} into {workdir}; " + (
        "with its tokenizer" if has_tokenizer else f"no {TOKENIZER}: texts are read as bytes"
    )
