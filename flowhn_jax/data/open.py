"""The prepared sets that a run reads, and their tokenizer."""

from flowhn_jax.data.config import RunConfig
from flowhn_jax.data.prepare import ensure_embedded
from flowhn_jax.data.prepared import TOKENIZER, PreparedSet
from flowhn_jax.data.run_data import NamedSet, RunData
from flowhn_jax.data.tokenizer import Tokenizer, load_tokenizer, recipe_vocab_size
from flowhn_jax.data.tokenizer_config import (
    SETTINGS,
    find_file,
    first_token_choice,
    named_token,
    read_settings,
)
from flowhn_jax.storage import AnyPath, place


def open_data(config: RunConfig, workdir: AnyPath) -> RunData:
    """Return the prepared sets that the config names, or the embedded corpus under `workdir`.

    Raises:
      ValueError: the sets of a mixture differ in tokenizer, context or first token; or see
        `open_prepared`.
    """
    training, validation = (
        tuple(NamedSet(each.name, each.weight, open_prepared(config, each.path)) for each in sets)
        for sets in (config.data.training_sets, config.data.validation_sets)
    )
    if not training:
        folder = ensure_embedded(place(workdir) / "data", config.model.context).folder
        training = RunData.of(open_prepared(config, folder)).training
    data = RunData(training, validation)
    data.check()
    return data


def open_prepared(config: RunConfig, folder: AnyPath) -> PreparedSet:
    """Return the prepared set in `folder`, checked against the config's model.

    Raises:
      ValueError: the set has another context than the model, or a larger vocabulary.
    """
    prepared = PreparedSet.open(folder, config.data.cache)
    if prepared.context != config.model.context:
        raise ValueError(
            f"The prepared set {prepared.folder} has a context of {prepared.context} tokens, but "
            f"model.context is {config.model.context}; prepare it with "
            f"--context={config.model.context}, or train with "
            f"--config.model.context={prepared.context}"
        )
    _check_vocabulary(prepared.tokenizer, config, prepared.folder)
    return prepared


def open_tokenizer(config: RunConfig, workdir: AnyPath) -> Tokenizer:
    """Return the tokenizer of the run in `workdir`: its own if it was imported, or its data's.

    Raises:
      ValueError, FileNotFoundError: the data or the tokenizer's files are missing or damaged, or
        the model's vocabulary is smaller.
    """
    if (place(workdir) / TOKENIZER).is_file():
        tokenizer = read_tokenizer(workdir)
    elif config.data.path:
        return open_prepared(config, config.data.training_sets[0].path).tokenizer
    else:
        tokenizer = load_tokenizer("bytes")
    _check_vocabulary(tokenizer, config, workdir)
    return tokenizer


def read_tokenizer(folder: AnyPath) -> Tokenizer:
    """Return the tokenizer of a folder's tokenizer.json, with its tokenizer_config.json applied.

    The latter may name the end-of-text token and the token that begins a text, and record which
    token begins a text.
    """
    path = str(place(folder) / TOKENIZER)
    file = find_file(path, SETTINGS)
    settings = read_settings(file)
    eot_token = named_token(settings, "eos_token", file)
    first_token = first_token_choice(settings, file)
    return load_tokenizer(path, eot_token, first_token=first_token)


def _check_vocabulary(tokenizer: Tokenizer, config: RunConfig, folder: AnyPath) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size must be at least {tokenizer.vocab_size}, the vocabulary size of the "
            f"tokenizer of {folder}; got {config.model.vocab_size}. Train with "
            f"--config.model.vocab_size={recipe_vocab_size(tokenizer)}"
        )
