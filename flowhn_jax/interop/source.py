"""The model that a run starts from (`train.init_from`): another run's, or a folder's.

A folder has safetensors and a Hugging Face config, as `flowhn export` and transformers write it.
"""

from typing import Any

from jax.sharding import Mesh

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.files import steps_of
from flowhn_jax.checkpoints.parameters import load_params as load_checkpoint
from flowhn_jax.config import ModelConfig
from flowhn_jax.data.open import open_tokenizer
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.interop import huggingface, tokenizer_files
from flowhn_jax.interop.layout import put_sharded
from flowhn_jax.models import Params
from flowhn_jax.storage import AnyPath, readable_place

_CONFIG = "config.json"
# Keys that divide parameters of the same shapes in other ways.
_DIVISIONS = ("kind", "heads", "kv_heads", "head_dim", "ssm_head_dim", "ssm_groups")


def read_model(source: str) -> ModelConfig:
    """Return the config of the source's model.

    Args:
      source: a workdir, or a folder with safetensors; local, gs:// or hf://.

    Raises:
      FileNotFoundError: it is neither.
      ValueError: it holds a model that is not supported, or a damaged file.
    """
    if _is_run(source):
        return workdir_lib.read_config(source).model
    return huggingface.config_of(huggingface.read_config(source))


def read_tokenizer(source: str) -> Tokenizer | None:
    """Return the tokenizer of the source's model; None if it does not come with one.

    Raises:
      ValueError: its files are damaged.
    """
    if not _is_run(source):
        return tokenizer_files.read_tokenizer(readable_place(source))
    try:
        return open_tokenizer(workdir_lib.read_config(source), source)
    except FileNotFoundError:  # the data that the run was trained on are gone
        return None


def read_texts(folder: AnyPath) -> dict[str, str]:
    """Return the texts of a Hugging Face folder's files for tokenizer and generation, by name.

    Those keys of config.json that concern them are in hf_config.json.

    Raises:
      ValueError: as in `tokenizer_files.read`, or an id in config.json is not a number.
    """
    keys = tokenizer_files.keys_to_keep(huggingface.read_config(folder))
    return tokenizer_files.read(folder) | {tokenizer_files.CONFIG_KEYS: keys}


def keep_files(source: str, tokenizer: Tokenizer, workdir: str) -> None:
    """Write the source's files for tokenizer and generation to the workdir of a run.

    An export of the run then has them as well. A source that comes without a tokenizer, or is a run
    that was not imported, has none.

    Args:
      source: as in `read_model`.
      tokenizer: the run's, the same as the source's; a text may begin with another token.
      workdir: the folder of the run.
    """
    if _is_run(source):
        texts = tokenizer_files.read(source, tokenizer_files.CONFIG_KEYS)
    else:
        texts = read_texts(source)
    if texts and read_tokenizer(source) is not None:
        tokenizer_files.write(workdir, tokenizer_files.files_to_keep(texts, tokenizer))


def check_fit(source: str, theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """Check that a model can have the parameters of another one.

    Keys that change no shape may differ, such as the context, the split or the base of rotary
    positions, but not those that divide a parameter into heads.

    Args:
      source: where the other model is from, for messages.
      theirs: the other model.
      ours: the model of the run.

    Returns:
      The keys that differ, as 'key: source -> run'.

    Raises:
      ValueError: parameters differ in shape, or are divided in other ways.
    """
    before, after = (config_lib.to_dict(model) for model in (theirs, ours))
    del before["dtype"], after["dtype"]
    changes = config_lib.differences(before, after, "model.")
    shapes = workdir_lib.differences_of_shape(*map(models.abstract_params, (theirs, ours)))
    if shapes or any(before[key] != after[key] for key in _DIVISIONS):
        raise ValueError(
            f"train.init_from: the model of {source!r} must fit that of the run, from which it "
            f"differs in {'; '.join(changes)}"
            + (f"; therefore these parameters differ in shape: {shapes}. " if shapes else ". ")
            + "Keys that are not set take the source's values."
        )
    return changes


def load_params(source: str, config: ModelConfig, mesh: Mesh) -> Params:
    """Return the source's parameters, sharded over the mesh.

    Args:
      source: as in `read_model`; the newest checkpoint of a run.
      config: a model that fits (`check_fit`).
      mesh: whose devices each get their own part.

    Raises:
      ValueError, FileNotFoundError: a file is missing or damaged.
    """
    if _is_run(source):
        return load_checkpoint(source, config, mesh)
    return huggingface.load(source, put_sharded(config, mesh))[1]


def _is_run(source: str) -> bool:
    """Return whether a source is a workdir; raise FileNotFoundError if it is no source at all."""
    folder = readable_place(source)
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(
            "train.init_from must be the workdir of a run, or a folder with config.json and "
            f"safetensors as transformers saves it; there is no {_CONFIG} in {source!r}."
        )
    found: dict[str, Any] = huggingface.read_config(folder)
    if "model_type" in found:
        return False
    if not steps_of(source):
        raise FileNotFoundError(
            f"train.init_from must hold a checkpoint; there is none in {source!r} yet."
        )
    return True
