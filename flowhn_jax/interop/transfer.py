"""Runs to folders of safetensors, and such folders to workdirs that eval.py takes."""

import dataclasses
import pathlib

from flowhn_jax import models
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.parameters import LATEST, load_params, save_params
from flowhn_jax.config import Config, MeshConfig, ModelConfig
from flowhn_jax.data.open import open_tokenizer
from flowhn_jax.data.prepared import TOKENIZER
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.interop import huggingface, tokenizer_files
from flowhn_jax.parallel.mesh import make_mesh


def export_run(workdir: str, out: str, checkpoint: str = LATEST) -> str:
    """Writes a checkpoint's model to `out`: config.json, safetensors, and its tokenizer.

    The latter is tokenizer.json, tokenizer_config.json and what else the run was imported with;
    bytes have none. `checkpoint` is as of `load_params`.

    Returns:
      A line that says what was written.

    Raises:
      FileNotFoundError: `workdir` holds no run or no checkpoint.
      ValueError: as of `huggingface.save`, a damaged file of the tokenizer, or `out` holds one
        that this model does not have, or a run.
    """
    if (pathlib.Path(out) / "checkpoints").is_dir():
        raise ValueError(f"--out is {out!r}, the workdir of a run; accepted is another folder.")
    config = workdir_lib.read_config(workdir)
    mesh = make_mesh(MeshConfig(data=1), 1)
    params = load_params(workdir, config.model, mesh, checkpoint)
    tokenizer = open_tokenizer(config, workdir)
    texts = tokenizer_files.read(pathlib.Path(workdir), tokenizer_files.CONFIG_KEYS)
    texts = tokenizer_files.of_tokenizer(texts, tokenizer)
    keys = tokenizer_files.config_keys(texts, tokenizer)
    texts.pop(tokenizer_files.CONFIG_KEYS, None)
    tokenizer_files.check_replaces_all(pathlib.Path(out), texts)
    huggingface.save(out, config.model, params, keys)
    tokenizer_files.write(pathlib.Path(out), texts)
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
    texts = _read_texts(pathlib.Path(source), model)
    workdir_lib.make(workdir)
    tokenizer_files.write(path, texts)
    workdir_lib.write_config(workdir, dataclasses.replace(Config(), model=model))
    save_params(workdir, model, params)
    count = models.param_count(model)
    return f"read {model.name}, {count:,} parameters, from {source} into {workdir}; " + (
        "with its tokenizer" if TOKENIZER in texts else f"no {TOKENIZER}: texts are read as bytes"
    )


def _read_texts(source: pathlib.Path, model: ModelConfig) -> dict[str, str]:
    """Return the files that the workdir keeps of a checkpoint besides the model, by name.

    Raises:
      ValueError: as of `tokenizer_files.read`, or the tokenizer has more tokens than the model.
    """
    texts = tokenizer_files.read(source)
    texts[tokenizer_files.CONFIG_KEYS] = tokenizer_files.kept_keys(huggingface.read_config(source))
    path = source / TOKENIZER
    if not path.is_file():
        return tokenizer_files.of_tokenizer(texts, load_tokenizer("bytes"))
    eot_token = tokenizer_files.end_of_text(texts, path)
    tokenizer = load_tokenizer(str(path), eot_token)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{str(path)!r} has {tokenizer.vocab_size} tokens, but config.json's vocab_size is "
            f"{model.vocab_size}; accepted is a tokenizer whose ids the model has. transformers' "
            f"model.resize_token_embeddings({tokenizer.vocab_size}) adds the missing ones."
        )
    return tokenizer_files.of_tokenizer(texts, tokenizer)
