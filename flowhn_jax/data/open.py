"""Which prepared set a run reads, and its tokenizer."""

import pathlib

from flowhn_jax.config import Config
from flowhn_jax.data.prepare import ensure_embedded
from flowhn_jax.data.prepared import TOKENIZER, PreparedSet
from flowhn_jax.data.tokenizer import Tokenizer, load_tokenizer


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
    if prepared.tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"The tokenizer of {prepared.folder} has {prepared.tokenizer.vocab_size} tokens, but "
            f"model.vocab_size is {config.model.vocab_size}; accepted is at least the former."
        )
    return prepared


def open_tokenizer(config: Config, workdir: str) -> Tokenizer:
    """The tokenizer of the run in `workdir`: its own where it was imported, else that of its data.

    Raises:
      ValueError, FileNotFoundError: as of `open_data`.
    """
    path = pathlib.Path(workdir) / TOKENIZER
    return load_tokenizer(str(path)) if path.is_file() else open_data(config, workdir).tokenizer
