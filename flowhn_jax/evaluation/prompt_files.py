"""Prompts from a file."""

import pathlib

from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import short_repr


def read_prompts(path: str) -> list[str]:
    """One prompt a line: of a text file as it stands, of a .jsonl file a string or its 'prompt'.

    Empty lines are left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not UTF-8 or not JSON, or there is no prompt.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--prompts is {path!r}; accepted is a text or .jsonl file.")
    prompts = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path!r}, line {number}, is not UTF-8 text: {error}.") from error
        prompts.append(_of_json(path, number, text) if file.suffix == ".jsonl" else text)
    if not prompts:
        raise ValueError(f"{path!r} has no prompt; accepted is one a line.")
    return prompts


def _of_json(path: str, number: int, line: str) -> str:
    found = json_text.loads(line, f"{path!r}, line {number},")
    prompt = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(prompt, str):
        raise ValueError(
            f"{path!r}, line {number}, is {short_repr(line)}; accepted is a string, or an object with "
            "'prompt'."
        )
    return prompt
