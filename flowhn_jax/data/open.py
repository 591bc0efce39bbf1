"""Which prepared set a run reads."""

import pathlib

from flowhn_jax.config import Config
from flowhn_jax.data.prepare import ensure_embedded
from flowhn_jax.data.prepared import PreparedSet


def open_data(config: Config, workdir: str) -> PreparedSet:
    """The prepared set that the config names, by default the embedded corpus under `workdir`.

    Raises:
      ValueError: the set was cut for another context, or its vocabulary is larger than the model's.
    """
    if config.data.path:
        prepared = PreparedSet.open(config.data.path)
    else:
        prepared = ensure_embedded(str(pathlib.Path(workdir) / "data"), config.model.context)
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
