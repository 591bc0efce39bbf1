"""What stands next to a tokenizer.json: tokenizer_config.json and files of templates."""

import pathlib
from typing import Any

from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import short_repr

SETTINGS = "tokenizer_config.json"
# Its key with an object of settings that only this package reads. They are not at the top level,
# where transformers takes each key that ends in "_token" for a special token's.
OWN_SETTINGS = "flowhn_jax"
CHAT_TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
DEFAULT_TEMPLATE = "default"  # name of the one that is used without a name


def find_file(spec: str, name: str) -> pathlib.Path | None:
    """Return the path of a file that belongs to a tokenizer, None where there is none.

    Args:
      spec: of the tokenizer, as of `load_tokenizer`; 'hf:NAME' may use the network.
      name: of the file, in the folder of tokenizer.json or in the repository.

    Raises:
      ImportError, ValueError: as of `download`.
    """
    if spec == "bytes":
        return None
    if spec.startswith("hf:"):
        return download(spec, name, optional=True)
    path = pathlib.Path(spec)
    # The files of a folder are those of its tokenizer.json, not of another tokenizer in it.
    found = path.parent / name
    return found if path.name == "tokenizer.json" and found.is_file() else None


def download(spec: str, name: str, optional: bool = False) -> pathlib.Path | None:
    """Return the path of a file of 'hf:NAME', in the Hugging Face cache.

    Raises:
      ImportError: the package is missing.
      ValueError: the file cannot be fetched, or the repository lacks it and it is not optional.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"Tokenizer {spec} needs the package 'huggingface_hub' (pip install huggingface_hub)."
        ) from error
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(spec.removeprefix("hf:"), name))
    except Exception as error:  # network, absent repository, absent file, bad name
        unreachable = isinstance(error, errors.LocalEntryNotFoundError)
        if optional and isinstance(error, errors.EntryNotFoundError) and not unreachable:
            return None
        hint = " (not needed with --first_token=eot)" if optional else ""
        raise ValueError(f"Tokenizer {spec}: {name} cannot be fetched{hint}: {error}") from error


def read_settings(path: pathlib.Path | None) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json; empty where there is none.

    Raises:
      ValueError: it is not JSON, or no object.
    """
    if path is None:
        return {}
    return parse_object(path.read_bytes(), path)


def parse_object(content: str | bytes, path: pathlib.Path) -> dict[str, Any]:
    """Return the object that the JSON of a file holds.

    Raises:
      ValueError: it is not JSON, or no object.
    """
    found = json_text.loads(content, repr(str(path)))
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold an object; found {short_repr(found)}.")
    return found


def first_token_choice(settings: dict[str, Any], path: pathlib.Path | None) -> str:
    """Return the choice of the token that begins a text, as of `load_tokenizer`.

    Raises:
      ValueError: the settings of this package are no object. The choice itself is not checked.
    """
    own = settings.get(OWN_SETTINGS, {})
    if not isinstance(own, dict):
        raise ValueError(
            f"{str(path)!r} has {OWN_SETTINGS} {short_repr(own)}; it must be an object."
        )
    return own.get("first_token", "auto")


def named_token(settings: dict[str, Any], key: str, path: pathlib.Path | None) -> str | None:
    """Return the token that settings name as, e.g., 'bos_token'; None where they name none.

    Raises:
      ValueError: it is not the text of a token.
    """
    token = token_text(settings.get(key))
    if not isinstance(token, str | None):
        raise ValueError(
            f"{str(path)!r} has {key} {short_repr(settings[key])}; accepted is a text, or an object "
            "with 'content'."
        )
    return token


def token_text(token: Any) -> Any:
    """Return the text of a special token, which may be an object with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def chat_templates(settings: dict[str, Any], path: pathlib.Path | None) -> dict[str, str]:
    """Return the chat templates of settings by name: those of one text, or of several with names.

    Raises:
      ValueError: they are neither.
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
        f"{str(path)!r} has chat_template {short_repr(found)}; accepted is a text, or a list of objects "
        "with 'name' and 'template'."
    )
