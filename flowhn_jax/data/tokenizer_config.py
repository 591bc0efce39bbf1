"""The files next to a tokenizer.json: tokenizer_config.json and chat templates."""

from typing import Any

from flowhn_jax.storage import Place, place, readable_place
from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import short_repr

SETTINGS = "tokenizer_config.json"
# The key in it for the settings of this package. They are not at the top level because transformers
# takes every key there that ends in "_token" for a special token.
OWN_SETTINGS = "flowhn_jax"
CHAT_TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
DEFAULT_TEMPLATE = "default"  # the name of the template that is used if none is named


def is_download(spec: str) -> bool:
    """Return whether a tokenizer is 'hf:NAME', a repository whose files are downloaded by name."""
    return spec.startswith("hf:") and not spec.startswith("hf://")


def locate(spec: str) -> Place:
    """Return where the tokenizer.json of a tokenizer is: a path, or that of 'hf:NAME'.

    Raises:
      ImportError: a package that this tokenizer needs is missing.
      ValueError: the file cannot be downloaded, or the path is of a kind that is not read.
    """
    if not is_download(spec):
        return readable_place(spec)
    path = _download(spec, "tokenizer.json", optional=False)
    assert path is not None  # only an optional file may be absent
    return path


def find_file(spec: str, name: str) -> Place | None:
    """Return the place of a file that belongs to a tokenizer, or None if there is none.

    Args:
      spec: the tokenizer, as in `load_tokenizer`; 'hf:NAME' may use the network.
      name: the file's name, in the folder of tokenizer.json or in the repository.

    Raises:
      ImportError, ValueError: see `locate`.
    """
    if spec == "bytes":
        return None
    if is_download(spec):
        return _download(spec, name, optional=True)
    path = readable_place(spec)
    # A folder's files belong to its tokenizer.json, not to another tokenizer in the same folder.
    found = path.parent / name
    return found if path.name == "tokenizer.json" and found.is_file() else None


def _download(spec: str, name: str, optional: bool) -> Place | None:
    """Return the place, in the Hugging Face cache, of a file of 'hf:NAME'.

    It is None if the file is optional and the repository lacks it.

    Raises:
      ImportError: the package huggingface_hub is missing.
      ValueError: the file cannot be downloaded.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"Tokenizer {spec} needs the package 'huggingface_hub': pip install huggingface_hub"
        ) from error
    try:
        return place(huggingface_hub.hf_hub_download(spec.removeprefix("hf:"), name))
    except Exception as error:  # network, absent repository, absent file, bad name
        is_unreachable = isinstance(error, errors.LocalEntryNotFoundError)
        if optional and isinstance(error, errors.EntryNotFoundError) and not is_unreachable:
            return None
        hint = " (not needed with --first_token=eot)" if optional else ""
        raise ValueError(f"Tokenizer {spec}: {name} cannot be downloaded{hint}: {error}") from error


def read_settings(path: Place | None) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json; empty if there is none.

    Raises:
      ValueError: the file does not hold a JSON object.
    """
    if path is None:
        return {}
    return parse_object(path.read(), path)


def parse_object(content: str | bytes, path: Place) -> dict[str, Any]:
    """Return the JSON object in a file's content.

    Raises:
      ValueError: the content is not a JSON object; the message names `path`.
    """
    found = json_text.loads(content, repr(str(path)))
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold an object; got {short_repr(found)}.")
    return found


def first_token_choice(settings: dict[str, Any], path: Place | None) -> str:
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


def named_token(settings: dict[str, Any], key: str, path: Place | None) -> str | None:
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


def chat_templates(settings: dict[str, Any], path: Place | None) -> dict[str, str]:
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
