"""Tokenizers: text to token ids and back."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from flowhn_jax.data.first_token import check_first_token
from flowhn_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from flowhn_jax.data.tokenizer_config import (
    SETTINGS,
    find_file,
    is_download,
    locate,
    named_token,
    read_settings,
)

_VOCABULARY_MULTIPLE = 128  # of the recipes' model.vocab_size; divides well over devices


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    @property
    def spec(self) -> str:
        """The specification that `load_tokenizer` was given."""
        ...

    @property
    def vocab_size(self) -> int:
        """The vocabulary size: every id is below it."""
        ...

    @property
    def eot_id(self) -> int:
        """The id of end-of-text, which ends every document."""
        ...

    @property
    def eot_token(self) -> str | None:
        """The text of end-of-text in the vocabulary; None for bytes."""
        ...

    @property
    def bos_token(self) -> str | None:
        """The beginning-of-text token, which `first_token` need not use; None if there is none."""
        ...

    @property
    def first_token(self) -> str:
        """Which token begins a text: 'bos', 'eot' or 'none'."""
        ...

    @property
    def first_ids(self) -> tuple[int, ...]:
        """The id of the token that begins a text; empty if `first_token` is 'none'."""
        ...

    @property
    def fingerprint(self) -> str:
        """A string that identifies the tokenizer, regardless of `first_token`."""
        ...

    def encode(self, text: str | bytes, *, parse_special: bool = False) -> np.ndarray:
        """Return the ids of a text, int32 [T], without `first_ids`.

        Args:
          text: a string, or UTF-8 bytes.
          parse_special: whether the names of special tokens in the text become these tokens, as in
            a rendered chat template. Otherwise no id is `eot_id` or one of `first_ids`.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, ignoring `eot_id`, `first_ids` and ids outside the vocabulary."""
        ...

    def beginning_with(self, first_token: str) -> "Tokenizer":
        """Return this tokenizer with another of `FIRST_TOKENS`; 'auto' changes nothing."""
        ...


def begin(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return the ids of a text with `first_ids` in front, unless they already begin with them."""
    first = list(tokenizer.first_ids)
    ids = list(map(int, ids))
    return ids if first and ids[: len(first)] == first else first + ids


def prefix_id(tokenizer: Tokenizer) -> int:
    """Return the id that a text's first token is predicted from: `first_ids`, or `eot_id`."""
    return tokenizer.first_ids[0] if tokenizer.first_ids else tokenizer.eot_id


def recipe_vocab_size(tokenizer: Tokenizer) -> int:
    """Return the model.vocab_size that a recipe for this tokenizer should have."""
    return -(-tokenizer.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and end-of-text as id 256."""

    spec = "bytes"
    vocab_size = 257
    eot_id = 256
    eot_token = None
    bos_token = None
    fingerprint = "bytes"

    def __init__(self, first_token: str = "auto"):
        """Make a tokenizer whose texts begin with end-of-text ('auto', 'eot') or nothing ('none').

        Raises:
          ValueError: `first_token` is another one; there is no beginning-of-text token.
        """
        check_first_token(first_token)
        if first_token == "bos":
            raise ValueError(
                "first_token must be auto, eot or none for the tokenizer 'bytes', which has no "
                "beginning-of-text token; got 'bos'. Type --first_token=eot"
            )
        self.first_token = "none" if first_token == "none" else "eot"
        self.first_ids: tuple[int, ...] = () if first_token == "none" else (self.eot_id,)

    def encode(self, text: str | bytes, *, parse_special: bool = False) -> np.ndarray:
        """Return the bytes of a text, int32 [T]."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def beginning_with(self, first_token: str) -> "ByteTokenizer":
        """Return a byte tokenizer with another first token; 'auto' changes nothing."""
        return self if first_token == "auto" else ByteTokenizer(first_token)


def load_tokenizer(
    spec: str,
    eot_token: str | None = None,
    bos_token: str | None = None,
    first_token: str = "auto",
) -> Tokenizer:
    """Return a tokenizer.

    Args:
      spec: 'bytes'; the path of a Hugging Face tokenizer.json, also gs:// or hf://; or 'hf:NAME', a
        repository of the Hugging Face hub that has one.
      eot_token: the end-of-text token of a Hugging Face tokenizer that has none of the usual ones.
        No text is ever encoded as this token.
      bos_token: the beginning-of-text token, if the post-processor adds none. None: the bos_token
        of tokenizer_config.json.
      first_token: what a text begins with. 'auto': the token that the tokenizer's post-processor
        adds, as in transformers; otherwise bos_token if tokenizer_config.json sets add_bos_token,
        or else end-of-text. 'bos', 'eot', 'none': that token, or nothing.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not a tokenizer, or end-of-text or the token that `first_token` asks
        for is not found.
      ImportError: a package that this tokenizer needs is missing; the message names it.
    """
    if spec == "bytes":
        if eot_token is not None:
            raise ValueError(
                "eot_token must be left out for the tokenizer 'bytes', which has its own "
                f"end-of-text token; got {eot_token!r}."
            )
        return ByteTokenizer(first_token)
    path = locate(spec)
    if not path.is_file():
        raise FileNotFoundError(
            f"Tokenizer {spec} does not exist: it must be bytes, FILE.json (a Hugging Face "
            "tokenizer.json, local, gs:// or hf://) or hf:NAME."
        )
    try:
        content = path.read_text().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"Tokenizer {spec} is not a text file: {error}.") from error
    may_use_bos = first_token in ("auto", "bos")
    if bos_token is None and (may_use_bos or not is_download(spec)):
        file = find_file(spec, SETTINGS)
        settings = read_settings(file)
        bos_token = named_token(settings, "bos_token", file)
        if may_use_bos and bos_token is not None and settings.get("add_bos_token") is True:
            first_token = "bos"
    return HuggingFaceTokenizer(spec, content, eot_token, bos_token, first_token)
