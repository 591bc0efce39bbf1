"""The files next to a tokenizer.json: tokenizer_config.json and chat templates."""

import pathlib
from typing import Any

from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import short_repr

SETTINGS = "tokenizer_config.json"
# The key in it for the settings of this package. They are not at the top level because transformers
# takes every key there that ends in "_token" for a special token.
OWN_SETTINGS = "flowhn_jax"
CHAT_TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
DEFAULT_TEMPLATE = "default"  # the name of the template that is used if none is named


def find_file(spec: str, name: str) -> pathlib.Path | None:
    """Return the path of a file that belongs to a tokenizer, or None if there is none.

    Args:
      spec: the tokenizer, as in `load_tokenizer`; 'hf:NAME' may use the network.
      name: the file's name, in the folder of tokenizer.json or in the repository.

    Raises:
      ImportError, ValueError: see `download`.
    """
    if spec == "bytes":
        return None
    if spec.startswith("hf:"):
        return _download(spec, name, optional=True)
    path = pathlib.Path(spec)
    # A folder's files belong to its tokenizer.json, not to another tokenizer in the same folder.
    found = path.parent / name
    return found if path.name == "tokenizer.json" and found.is_file() else None


def download(spec: str, name: str) -> pathlib.Path:
    """Return the path, in the Hugging Face cache, of a file of 'hf:NAME'.

    Raises:
      ImportError: the package huggingface_hub is missing.
      ValueError: the file cannot be downloaded.
    """
    path = _download(spec, name, optional=False)
    assert path is not None  # only an optional file may be absent
    return path


def _download(spec: str, name: str, optional: bool) -> pathlib.Path | None:
    """Do as `download`, but return None if the file is optional and the repository lacks it."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"Tokenizer {spec} needs the package 'huggingface_hub': pip install huggingface_hub"
        ) from error
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(spec.removeprefix("hf:"), name))
    except Exception as error:  # network, absent repository, absent file, bad name
        is_unreachable = isinstance(error, errors.LocalEntryNotFoundError)
        if optional and isinstance(error, errors.EntryNotFoundError) and not is_unreachable:
            return None
        hint = " (not needed with --first_token=eot)" if optional else ""
        raise ValueError(f"Tokenizer {spec}: {name} cannot be downloaded{hint}: {error}") from error


def read_settings(path: pathlib.Path | None) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json; empty if there is none.

    Raises:
      ValueError: the file does not hold a JSON object.
    """
    if path is None:
        return {}
    return parse_object(path.read_bytes(), path)


def parse_object(content: str | bytes, path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file's content.

    Raises:
      ValueError: the content is not a JSON object; the message names `path`.
    """
    found = json_text.loads(content, repr(str(path)))
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold an object; got {short_repr(found)}.")
    return found


def first_token_choice(settings: dict[str, Any], path: pathlib.Path | None) -> str:
    """Return the recorded `first_token` of `load_tokenizer`, unchecked; by default 'auto'.

    Raises:
      ValueError: the settings of this package are not an object.
    """
    own = settings.get(OWN_SETTINGS, {})
    if not isinstance(own, dict):
        raise ValueError(
            f"{OWN_SETTINGS} in {str(path)!r} must be an object; got {short_repr(own)}."
        )
    return own.get("first_token", "auto")


def named_token(settings: dict[str, Any], key: str, path: pathlib.Path | None) -> str | None:
    """Return the token under a key such as 'bos_token', or None if the settings name none.

    Raises:
      ValueError: the value is not the text of a token.
    """
    token = token_text(settings.get(key))
    if not isinstance(token, str | None):
        raise ValueError(
            f"{key} in {str(path)!r} must be a string, or an object with 'content'; "
            f"got {short_repr(settings[key])}."
        )
    return token


def token_text(token: Any) -> Any:
    """Return the text of a special token, which may be an object with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def chat_templates(settings: dict[str, Any], path: pathlib.Path | None) -> dict[str, str]:
    """Return the chat templates in the settings by name; a single one is the default.

    Raises:
      ValueError: chat_template is neither a string nor a list of named templates.
    """
    found = settings.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {DEFAULT_TEMPLATE: found}
    try:
        named = {each["name"]: each["template"] for each in found}
        if all(isinstance(text, str) for pair in named.items() for text in pair):
            return named
    except (KeyError, TypeError):
        pass
    raise ValueError(
        f"chat_template in {str(path)!r} must be a string, or a list of objects with 'name' and "
        f"'template'; got {short_repr(found)}."
    )
