"""The files of a Hugging Face checkpoint that configure its tokenizer and its generation.

An import copies them to the workdir and an export writes them again, so that transformers'
AutoTokenizer and GenerationConfig read the same from the export as from the source. The keys of
config.json with the same purpose are kept in the workdir's hf_config.json.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from flowhn_jax.data.first_token import FIRST_TOKENS
from flowhn_jax.data.library_errors import errors_as_value_error, hide_panic_output
from flowhn_jax.data.prepared import TOKENIZER
from flowhn_jax.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from flowhn_jax.data.tokenizer_config import (
    CHAT_TEMPLATE,
    NAMED_TEMPLATES,
    OWN_SETTINGS,
    SETTINGS,
    chat_templates,
    first_token_choice,
    named_token,
    parse_object,
    token_text,
)
from flowhn_jax.interop import byte_tokenizer
from flowhn_jax.storage import AnyPath, Place, place, readable_place
from flowhn_jax.utils.text import short_repr

GENERATION = "generation_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CONFIG_KEYS = "hf_config.json"

_OBJECTS = (SETTINGS, SPECIAL_TOKENS, "added_tokens.json", GENERATION)
_MAX_BYTES = 1 << 24  # of all files together; Gemma's, for 256,000 tokens, have 1.2 MB

_TOKENS = "bos_token", "eos_token", "pad_token"
IDS = "bos_token_id", "eos_token_id", "pad_token_id"
# What transformers reads from config.json if there is no generation_config.json.
_GENERATION_KEYS = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "do_sample",
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def read(folder: AnyPath, *others: str) -> dict[str, str]:
    """Return the texts of the files that exist in `folder`, by their relative paths.

    Args:
      folder: a checkpoint, an export or a workdir.
      others: names of further files with JSON objects.

    Raises:
      ValueError: one of them is not a file, too large, not UTF-8, or not readable by transformers.
    """
    folder = readable_place(folder)
    texts: dict[str, str] = {}
    bytes_left = _MAX_BYTES
    objects = *_OBJECTS, *others
    for name in (*objects, CHAT_TEMPLATE, *_templates(folder)):
        path = folder / name
        if not path.exists() and not _is_link(path):
            continue
        if not path.is_file():  # a folder, a pipe, or a link to one or to nothing
            raise ValueError(f"{str(path)!r} must be a file; it is not. Remove it.")
        with path.open() as file:
            content = file.read(bytes_left + 1)
        bytes_left -= len(content)
        if bytes_left < 0:
            raise ValueError(
                f"{str(path)!r} and the other files of the tokenizer must have at most "
                f"{_MAX_BYTES:,} bytes in total. Remove or shorten it."
            )
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(path)!r} must be UTF-8: {error}.") from error
        if name in objects:
            _check_object(path, text)
        texts[name] = text
    return texts


def files_for(texts: Mapping[str, str], tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of all files for a model with this tokenizer, by name.

    These are `texts`, tokenizer.json, and a tokenizer_config.json that names the end-of-text token
    and the token that begins a text; if it does so already, it is unchanged. A model that was
    imported without a tokenizer, and so reads bytes, keeps only its files for generation; its
    workdir has no tokenizer_config.json.
    """
    if isinstance(tokenizer, ByteTokenizer):
        if CONFIG_KEYS in texts and SETTINGS not in texts:
            return without_tokenizer(texts)
        ours = _dump(byte_tokenizer.settings(tokenizer))
        text = texts.get(SETTINGS, ours)
        first = tokenizer.beginning_with(first_token_choice(json.loads(text), None)).first_token
        text = text if first == tokenizer.first_token else ours
        return {**texts, SETTINGS: text, TOKENIZER: byte_tokenizer.to_json(tokenizer)}
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    # Without `tokenizer_class`, transformers uses the class of the family's first checkpoint, which
    # replaces parts of the tokenizer.
    plain = _dump({"tokenizer_class": "PreTrainedTokenizerFast"} | _bos_token(tokenizer))
    text = texts.get(SETTINGS, plain)
    settings = json.loads(text)
    changes = {}
    if token_text(settings.get("eos_token")) != tokenizer.eot_token:
        changes["eos_token"] = tokenizer.eot_token
    if not _begins_as(tokenizer, settings):
        changes |= _first_token_settings(tokenizer, settings)
    if changes:
        text = _dump(settings | changes)
    return {**texts, SETTINGS: text, TOKENIZER: tokenizer.json}


def files_to_keep(texts: Mapping[str, str], tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of the files that the workdir of a run with this tokenizer keeps, by name.

    They are those of `files_for`, except that a workdir without tokenizer.json reads bytes. Its
    tokenizer_config.json tells it apart from one of a model without a tokenizer.
    """
    if isinstance(tokenizer, ByteTokenizer):
        texts = {SETTINGS: _dump(byte_tokenizer.settings(tokenizer)), **texts}
    files = files_for(texts, tokenizer)
    if isinstance(tokenizer, ByteTokenizer):
        del files[TOKENIZER]
    return files


def without_tokenizer(texts: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of the files that do not concern the tokenizer, by name."""
    return {name: text for name, text in texts.items() if name in (GENERATION, CONFIG_KEYS)}


def read_tokenizer(folder: AnyPath, texts: Mapping[str, str] | None = None) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint's folder; None if it has no tokenizer.json.

    The tokenizer.json of a run on bytes is read as 'bytes', so that data prepared with 'bytes' fit.

    Args:
      folder: local, gs:// or hf://.
      texts: as `read` returns them, and the text of hf_config.json; None: those of the folder.

    Raises:
      ValueError: a file is damaged.
    """
    folder = readable_place(folder)
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    if texts is None:
        texts = read(folder) | {CONFIG_KEYS: (folder / "config.json").read_text()}
    tokenizer = load_tokenizer(str(path), end_of_text(texts, path))
    is_bytes = tokenizer.vocab_size == ByteTokenizer.vocab_size and byte_tokenizer.is_bytes(
        path.read_text()
    )
    return load_tokenizer("bytes") if is_bytes else tokenizer


def write(folder: AnyPath, texts: Mapping[str, str]) -> None:
    """Write the files that `read` reads, and tokenizer.json, to `folder`."""
    for name, text in texts.items():
        path = place(folder) / name
        path.parent.make_folder()
        path.write_whole(text)


def check_replaces_all(folder: AnyPath, texts: Iterable[str]) -> None:
    """Raise ValueError if a file of another model would stay in `folder` next to `texts`."""
    folder = place(folder)
    templates = folder / NAMED_TEMPLATES
    if _is_link(templates) or (templates.exists() and not templates.is_dir()):
        found = "a link" if _is_link(templates) else "a file"
        raise ValueError(f"{str(templates)!r} must be a folder; it is {found}. Remove it.")
    names = *_OBJECTS, TOKENIZER, CHAT_TEMPLATE
    existing = [name for name in names if (folder / name).exists()]
    for name in existing + _templates(folder):
        if name not in texts:
            raise ValueError(
                f"{str(folder / name)!r} must not exist, as the exported model has no such file "
                "and transformers would read it. Remove it, or choose another --out."
            )


def end_of_text(texts: Mapping[str, str], path: AnyPath) -> str | None:
    """Return the end-of-text token that a folder's files name; None if they name none.

    Args:
      texts: as `read` returns them, and the text of hf_config.json.
      path: the path of the folder's tokenizer.json.
    """
    token = _special_tokens(texts).get("eos_token")
    if token is not None:
        return token
    ids = _object(texts, CONFIG_KEYS).get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    if first is None:
        return None
    known = _vocabulary(readable_place(path).read().decode(errors="replace"))
    return next((token for token, index in known.items() if index == first), None)


def config_keys(texts: Mapping[str, str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the keys of config.json that are not the model's: imported ones and token ids.

    If the run was not imported, ids that the tokenizer does not have are None: for a missing key,
    transformers uses the id of the family's first checkpoint.
    """
    ids: dict[str, int | None] = {}
    if CONFIG_KEYS not in texts:
        ids = {**dict.fromkeys(IDS), "eos_token_id": tokenizer.eot_id}
        if isinstance(tokenizer, ByteTokenizer) and tokenizer.first_ids:
            ids["bos_token_id"] = tokenizer.first_ids[0]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        known = _vocabulary(tokenizer.json)
        for name, token in _special_tokens(texts).items():
            if token in known:
                ids[f"{name}_id"] = known[token]
    return ids | _object(texts, CONFIG_KEYS)


def keys_to_keep(hf_config: Mapping[str, Any]) -> str:
    """Return the text of hf_config.json: the keys of config.json for tokenizer and generation.

    Raises:
      ValueError: an id is not a number.
    """
    for key in IDS:
        ids = hf_config.get(key)
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(each, int | None) and not isinstance(each, bool) for each in ids):
            raise ValueError(
                f"config.json: {key} must be a token's id, a list of ids, or null; got "
                f"{short_repr(hf_config[key])}."
            )
    names = (*IDS, "tokenizer_class", *_GENERATION_KEYS)
    return _dump({name: hf_config[name] for name in names if name in hf_config})


def _templates(folder: Place) -> list[str]:
    """Return the relative paths of the named chat templates, sorted."""
    found = (folder / NAMED_TEMPLATES).children()
    return [f"{NAMED_TEMPLATES}/{each.name}" for each in found if each.name.endswith(".jinja")]


def _is_link(path: Place) -> bool:
    return not path.is_remote and path.local().is_symlink()


def _check_object(path: Place, text: str) -> None:
    """Raise ValueError if a file is not JSON with the types that its readers expect."""
    found = parse_object(text, path)
    if path.name in (SETTINGS, SPECIAL_TOKENS):
        for key in _TOKENS:
            named_token(found, key, path)
        chat_templates(found, path)


def _bos_token(tokenizer: HuggingFaceTokenizer) -> dict[str, str]:
    return {} if tokenizer.bos_token is None else {"bos_token": tokenizer.bos_token}


def _begins_as(tokenizer: HuggingFaceTokenizer, settings: dict[str, Any]) -> bool:
    """Return whether a text begins with the token that a reader of these settings would use."""
    choice = first_token_choice(settings, None)
    may_use_bos = choice in ("auto", "bos") and token_text(settings.get("bos_token")) is not None
    if may_use_bos and settings.get("add_bos_token") is True:
        choice = "bos"
    choice = tokenizer.rule if choice == "auto" else choice
    if choice not in FIRST_TOKENS or (choice == "bos" and tokenizer.bos_token is None):
        return False
    return tokenizer.beginning_with(choice).first_ids == tokenizer.first_ids


def _first_token_settings(
    tokenizer: HuggingFaceTokenizer, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return what the settings need for a text to begin with the tokenizer's first token."""
    ours = {OWN_SETTINGS: {"first_token": tokenizer.first_token}}
    if tokenizer.first_token == "bos":
        adds_bos = {"add_bos_token": True} | _bos_token(tokenizer)
        return adds_bos | ours if OWN_SETTINGS in settings else adds_bos
    return {"add_bos_token": False} | ours if settings.get("add_bos_token") else ours


def _special_tokens(texts: Mapping[str, str]) -> dict[str, str]:
    """Return the named tokens, as transformers resolves them."""
    found = _object(texts, SETTINGS)
    if "added_tokens_decoder" not in found:  # written by transformers before 4.34
        found |= _object(texts, SPECIAL_TOKENS)
    named = {name: token_text(found.get(name)) for name in _TOKENS}
    return {name: token for name, token in named.items() if token is not None}


def _object(texts: Mapping[str, str], name: str) -> dict[str, Any]:
    return json.loads(texts.get(name, "{}"))


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _vocabulary(content: str) -> dict[str, int]:
    with errors_as_value_error("tokenizer.json cannot be read"), hide_panic_output():
        import tokenizers

        return tokenizers.Tokenizer.from_str(content).get_vocab()
