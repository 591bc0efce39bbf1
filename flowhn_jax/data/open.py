"""Which prepared set a run reads, and its tokenizer."""

import os
import pathlib

from flowhn_jax.config import Config
from flowhn_jax.data.prepare import ensure_embedded
from flowhn_jax.data.prepared import TOKENIZER, PreparedSet
from flowhn_jax.data.tokenizer import Tokenizer, load_tokenizer, recipe_vocab_size
from flowhn_jax.data.tokenizer_config import (
    SETTINGS,
    find_file,
    first_token_choice,
    named_token,
    read_settings,
)


def open_data(config: Config, workdir: str) -> PreparedSet:
    """The prepared set that the config names, by default the embedded corpus under `workdir`.

    Raises:
      ValueError: as of `open_prepared`.
    """
    if config.data.path:
        return open_prepared(config, config.data.path)
    folder = ensure_embedded(str(pathlib.Path(workdir) / "data"), config.model.context).folder
    return open_prepared(config, str(folder))


def open_prepared(config: Config, folder: str) -> PreparedSet:
    """The prepared set in `folder`, for the config's model.

    Raises:
      ValueError: the set was cut for another context, or its vocabulary is larger than the model's.
    """
    prepared = PreparedSet.open(folder)
    if prepared.context != config.model.context:
        raise ValueError(
            f"The prepared set {prepared.folder} holds windows of {prepared.context} tokens, but "
            f"model.context is {config.model.context}; accepted is a set prepared with "
            f"--context={config.model.context}."
        )
    _check_vocabulary(prepared.tokenizer, config, prepared.folder)
    return prepared


def open_tokenizer(config: Config, workdir: str) -> Tokenizer:
    """The tokenizer of the run in `workdir`: its own where it was imported, else that of its data.

    Raises:
      ValueError, FileNotFoundError: the data or the tokenizer's files are missing or damaged, or
        the model has fewer tokens.
    """
    if (pathlib.Path(workdir) / TOKENIZER).is_file():
        tokenizer = read_tokenizer(workdir)
    elif config.data.path:
        return open_data(config, workdir).tokenizer
    else:
        tokenizer = load_tokenizer("bytes")
    _check_vocabulary(tokenizer, config, workdir)
    return tokenizer


def read_tokenizer(folder: str) -> Tokenizer:
    """Return the tokenizer of tokenizer.json, as tokenizer_config.json next to it sets it.

    That may name the end-of-text token, the one that begins a text, and the choice of the latter.
    """
    path = str(pathlib.Path(folder) / TOKENIZER)
    file = find_file(path, SETTINGS)
    settings = read_settings(file)
    eot_token, first_token = (
        named_token(settings, "eos_token", file),
        first_token_choice(settings, file),
    )
    return load_tokenizer(path, eot_token, first_token=first_token)


def _check_vocabulary(tokenizer: Tokenizer, config: Config, folder: str | os.PathLike) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"The tokenizer of {folder} has {tokenizer.vocab_size} tokens, but model.vocab_size is "
            f"{config.model.vocab_size}; to train a model of that size type "
            f"--config.model.vocab_size={recipe_vocab_size(tokenizer)}"
        )
