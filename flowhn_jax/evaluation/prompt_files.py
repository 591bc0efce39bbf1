"""Read prompts from a file."""

from flowhn_jax.storage import place
from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import short_path, short_repr


def read_prompts(path: str) -> list[str]:
    """Return the prompts in a file, one per line, without empty lines.

    A line of a .jsonl file is a string or an object with 'prompt'; a line of any other file is the
    prompt itself.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not UTF-8 or not such JSON, or there is no prompt.
    """
    file = place(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"--prompts must be a text file or a .jsonl file; {short_path(path)} is not a file."
        )
    prompts = []
    for number, line in enumerate(file.read().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path!r}, line {number}, must be UTF-8 text: {error}.") from error
        prompts.append(_parse_json(path, number, text) if file.name.endswith(".jsonl") else text)
    if not prompts:
        raise ValueError(f"{path!r} must have a prompt per line; it has none.")
    return prompts


def _parse_json(path: str, number: int, line: str) -> str:
    found = json_text.loads(line, f"{path!r}, line {number},")
    prompt = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(prompt, str):
        raise ValueError(
            f"{path!r}, line {number}, must be a string or an object with 'prompt'; got "
            f"{short_repr(line)}."
        )
    return prompt
