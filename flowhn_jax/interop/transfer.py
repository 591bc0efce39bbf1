"""Runs to folders of safetensors, and such folders to workdirs that eval.py takes."""

import dataclasses
import os
import pathlib
import shutil

import jax

from flowhn_jax import models
from flowhn_jax.config import Config, DataConfig, MeshConfig
from flowhn_jax.data.open import open_data
from flowhn_jax.data.prepared import TOKENIZER
from flowhn_jax.interop import huggingface
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training import workdir as workdir_lib
from flowhn_jax.training.checkpoint import load_params, save_params


def export_run(workdir: str, out: str) -> str:
    """Writes the newest checkpoint's model to `out`: config.json, safetensors, and tokenizer.json.

    Byte tokens need no tokenizer.json, and have none.

    Returns:
      A line that says what was written.

    Raises:
      FileNotFoundError: `workdir` holds no run or no checkpoint.
      ValueError: as of `huggingface.save`.
    """
    config = workdir_lib.read_config(workdir)
    mesh = make_mesh(MeshConfig(data=1), 1)
    params = load_params(workdir, config.model, mesh)
    tokenizer = pathlib.Path(workdir) / TOKENIZER
    if not tokenizer.is_file():
        tokenizer = open_data(config, workdir).folder / TOKENIZER
    huggingface.save(out, config.model, params)
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, pathlib.Path(out) / TOKENIZER)
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
    workdir_lib.make(workdir)
    tokenizer = pathlib.Path(source) / TOKENIZER
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, path / TOKENIZER)
    config = dataclasses.replace(Config(), model=model, data=DataConfig())
    workdir_lib.write_config(workdir, config)
    save_params(workdir, jax.tree.map(jax.numpy.asarray, params))
    count = models.param_count(model)
    return f"read {model.name}, {count:,} parameters, from {os.fspath(source)} into {workdir}"
