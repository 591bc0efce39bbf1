"""Tokenizers: text to token ids and back."""

import functools
import hashlib
import json
import pathlib
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from flowhn_jax.data.native import failures_as_value_error, panics_unprinted
from flowhn_jax.data.tokenizer_config import (
    SETTINGS,
    download,
    find_file,
    named_token,
    read_settings,
)
from flowhn_jax.utils.limits import MAX_INT
from flowhn_jax.utils.text import short_list, short_repr

# End-of-text tokens in use, the likeliest first.
_EOT_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001  DeepSeek's, with these characters
)

# What a text may be asked to begin with; 'auto' is the tokenizer's own rule.
FIRST_TOKENS = ("auto", "bos", "eot", "none")

_VOCABULARY_MULTIPLE = 128  # of the recipes' model.vocab_size; divides well over devices


class Tokenizer(Protocol):
    """What every tokenizer offers.

    Attributes:
      spec: what `load_tokenizer` was given.
      vocab_size: all ids are below it.
      eot_id: the id that ends every document.
      eot_token: its text in the vocabulary, None where it has none.
      bos_token: the token that the tokenizer has for the beginning of a text, None where it has
        none; its rule may be not to use it.
      first_token: which token begins a text: 'bos', 'eot' or 'none'.
      first_ids: the id of that token; empty where nothing begins a text.
      fingerprint: equal for two tokenizers exactly where they are the same, whatever begins a text.
    """

    spec: str
    vocab_size: int
    eot_id: int
    eot_token: str | None
    bos_token: str | None
    first_token: str
    first_ids: tuple[int, ...]
    fingerprint: str

    def encode(self, text: str | bytes, *, parse_special: bool = False) -> np.ndarray:
        """Return ids, int32 [T], of a text (bytes are UTF-8), without `first_ids`.

        None of them is `eot_id` or one of `first_ids`, unless `parse_special` says that the names
        of special tokens in the text stand for these tokens, as in a rendered chat template.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without `eot_id`, `first_ids` and ids beyond the vocabulary."""

    def beginning_with(self, first_token: str) -> "Tokenizer":
        """Return the tokenizer whose texts begin with one of `FIRST_TOKENS`; 'auto': as its own."""


def begin(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return the ids of a text after the token that begins it, unless they begin with it."""
    first = list(tokenizer.first_ids)
    ids = list(map(int, ids))
    return ids if first and ids[: len(first)] == first else first + ids


def prefix_id(tokenizer: Tokenizer) -> int:
    """Return the id to predict a text's first token from, also where nothing begins a text."""
    return tokenizer.first_ids[0] if tokenizer.first_ids else tokenizer.eot_id


def recipe_vocab_size(tokenizer: Tokenizer) -> int:
    """Return the model.vocab_size that a recipe for this tokenizer should have."""
    return -(-tokenizer.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as end-of-text."""

    spec = "bytes"
    vocab_size = 257
    eot_id = 256
    eot_token = None
    bos_token = None
    fingerprint = "bytes"

    def __init__(self, first_token: str = "auto"):
        """Texts begin with `first_token`: end-of-text ('auto', 'eot') or nothing ('none')."""
        _check_first_token(first_token)
        if first_token == "bos":
            raise _without_bos("bytes")
        self.first_token = "none" if first_token == "none" else "eot"
        self.first_ids = () if first_token == "none" else (self.eot_id,)

    def encode(self, text: str | bytes, *, parse_special: bool = False) -> np.ndarray:
        """Return the bytes of the text, int32 [T]."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def beginning_with(self, first_token: str) -> "ByteTokenizer":
        """Return bytes whose texts begin with another token; 'auto': the same."""
        return self if first_token == "auto" else ByteTokenizer(first_token)


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library.

    No special token is ever added, and none is looked for in a text. The end-of-text token and the
    one that begins a text cannot be spelled either: the tokenizer that encodes knows them under
    random names, so that their text is encoded as any other text. Where a file gives the id of one
    of them to unknown text as well, unknown text has no ids. Truncation and padding that the file
    may ask for are off.

    Attributes:
      rule: what tokenizer.json alone has a text begin with: 'bos', 'eot' or 'several' tokens.
    """

    def __init__(
        self,
        spec: str,
        json: str,
        eot_token: str | None = None,
        bos_token: str | None = None,
        first_token: str = "auto",
    ):
        """`json` is the content of a tokenizer.json; see `load_tokenizer` for the rest."""
        try:
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"Tokenizer {spec} needs the package 'tokenizers' (pip install tokenizers)."
            ) from error
        library = _load(spec, json)
        vocabulary = library.get_vocab()
        self.spec = spec
        self.json = json
        self.eot_token = _find_eot(spec, vocabulary, eot_token)
        self.eot_id = vocabulary[self.eot_token]
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > MAX_INT:
            raise ValueError(
                f"Tokenizer {spec} has id {self.vocab_size - 1}; the most is {MAX_INT - 1}."
            )
        leading = _leading_ids(spec, library)
        if len(leading) == 1:
            bos_token = library.id_to_token(leading[0])
        self.bos_token = bos_token if bos_token in vocabulary else None
        alone = "bos" if leading and leading[0] != self.eot_id else "eot"
        self.rule = "several" if len(leading) > 1 else alone
        self.first_token = self._choose(first_token)
        bos_id = vocabulary.get(self.bos_token)
        self.first_ids = {"bos": (bos_id,), "eot": (self.eot_id,), "none": ()}[self.first_token]
        if self.first_ids == (self.eot_id,):
            self.first_token = "eot"  # one token may be both
        self.fingerprint = hashlib.sha256(f"{json}\n{self.eot_token}".encode()).hexdigest()
        self._hidden = {self.eot_id, *self.first_ids}
        names = {token for token, i in vocabulary.items() if i in self._hidden}
        with failures_as_value_error(f"Tokenizer {spec} cannot be read"):
            encoding = _with_secret_names(json, names)
        self._tokenizer = _load(spec, encoding)
        self._tokenizer.encode_special_tokens = True

    @functools.cached_property
    def _parser(self) -> Any:
        """The library's tokenizer, which finds special tokens in a text."""
        return _load(self.spec, self.json)

    def _choose(self, first_token: str) -> str:
        """Return what a text begins with, 'bos', 'eot' or 'none'."""
        _check_first_token(first_token)
        chosen = self.rule if first_token == "auto" else first_token
        if chosen == "several":
            raise ValueError(
                f"Tokenizer {self.spec} begins a text with several tokens; accepted is one: type "
                "--first_token=bos or --first_token=eot"
            )
        if chosen == "bos" and self.bos_token is None:
            raise _without_bos(self.spec)
        return chosen

    def encode(self, text: str | bytes, *, parse_special: bool = False) -> np.ndarray:
        """Return ids, int32 [T].

        Raises:
          UnicodeDecodeError: bytes that are not UTF-8.
          ValueError: the library fails on this text.
        """
        text = text if isinstance(text, str) else text.decode()
        library = self._parser if parse_special else self._tokenizer
        with (
            failures_as_value_error(f"Tokenizer {self.spec} cannot encode a text"),
            panics_unprinted(),
        ):
            # The batched call alone skips the offsets, which cost as much as the ids.
            (encoding,) = library.encode_batch_fast([text], add_special_tokens=False)
            ids = np.array(encoding.ids, np.int32)
        if parse_special:
            return ids
        for hidden in self._hidden:
            ids = ids[ids != hidden]  # what is left of them is unknown text
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, with special tokens other than `eot_id` and `first_ids`.

        Raises:
          ValueError: the library fails on these ids.
        """
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._hidden]
        with (
            failures_as_value_error(f"Tokenizer {self.spec} cannot decode {len(kept)} ids"),
            panics_unprinted(),
        ):
            return self._tokenizer.decode(kept, skip_special_tokens=False)

    def beginning_with(self, first_token: str) -> "HuggingFaceTokenizer":
        """Return the tokenizer whose texts begin with another token; 'auto': the same."""
        if first_token in ("auto", self.first_token):
            return self
        return HuggingFaceTokenizer(
            self.spec, self.json, self.eot_token, self.bos_token, first_token
        )

    def __reduce__(self):
        # The library's own pickling forgets that special tokens are plain text.
        arguments = self.spec, self.json, self.eot_token, self.bos_token, self.first_token
        return HuggingFaceTokenizer, arguments


def _check_first_token(first_token: str) -> None:
    if first_token not in FIRST_TOKENS:
        raise ValueError(
            f"first_token must be one of {', '.join(FIRST_TOKENS)}; got {short_repr(first_token)}."
        )


def _without_bos(spec: str) -> ValueError:
    return ValueError(
        f"Tokenizer {spec} has no token for the beginning of a text, neither by its post_processor "
        f"nor as bos_token of {SETTINGS}; type --first_token=eot"
    )


def _leading_ids(spec: str, library: Any) -> list[int]:
    """Return the ids that a tokenizer's post-processor puts before a text."""
    import tokenizers

    if library.post_processor is None:
        return []
    word = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    text = tokenizers.Tokenizer(word).encode("a")
    with failures_as_value_error(f"Tokenizer {spec} cannot be read"), panics_unprinted():
        processed = library.post_processor.process(text)
    added = processed.special_tokens_mask
    return processed.ids[: added.index(0)] if 0 in added else []


def _load(spec: str, content: str) -> Any:
    """Return the library's tokenizer of a tokenizer.json; truncation and padding are off."""
    import tokenizers

    what = f"Tokenizer {spec} is not a Hugging Face tokenizer.json"
    with failures_as_value_error(what), panics_unprinted():
        library = tokenizers.Tokenizer.from_str(content)
        library.no_truncation()
        library.no_padding()
    return library


def _with_secret_names(content: str, tokens: set[str]) -> str:
    """Return a tokenizer.json in which `tokens` have names that no text has; their ids stay.

    A vocabulary without them would not do: the library numbers added tokens by its size.
    """
    names = {token: secrets.token_hex(16) for token in tokens}
    fields = json.loads(content)
    model = fields["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:  # Unigram's, with scores
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            merge for merge in model["merges"] if not _involves(merge, prefix, tokens)
        ]
    for added in fields.get("added_tokens") or []:
        if added["content"] in names:
            added |= {"content": names[added["content"]], "special": True}
    return json.dumps(fields)


def _involves(merge: str | list[str], prefix: str, tokens: set[str]) -> bool:
    """Whether a merge of BPE makes or needs one of `tokens`."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return bool(tokens & {left, right, left + right.removeprefix(prefix)})


def _find_eot(spec: str, vocabulary: dict[str, int], eot_token: str | None) -> str:
    if eot_token is not None:
        if eot_token not in vocabulary:
            raise ValueError(
                f"Tokenizer {spec} has no token {short_repr(eot_token)} to end a text with."
            )
        if len(eot_token) == 1:
            raise ValueError(
                f"eot_token must be a token that no text needs, and {eot_token!r} of tokenizer "
                f"{spec} is a single character; name another."
            )
        return eot_token
    for name in _EOT_TOKENS:
        if name in vocabulary:
            return name
    special = [
        name for name in vocabulary if name.startswith(("<", "[")) and name.endswith((">", "]"))
    ]
    raise ValueError(
        f"Tokenizer {spec} has none of the usual end-of-text tokens ({', '.join(_EOT_TOKENS)}); "
        f"name its own as eot_token. What looks like one: {short_list(special) or 'nothing'}."
    )


def load_tokenizer(
    spec: str,
    eot_token: str | None = None,
    bos_token: str | None = None,
    first_token: str = "auto",
) -> Tokenizer:
    """Return a tokenizer.

    Args:
      spec: 'bytes'; the path of a Hugging Face tokenizer.json; or 'hf:NAME', a repository of the
        Hugging Face hub that has one (the only case that may use the network).
      eot_token: the end-of-text token of a Hugging Face tokenizer, where it is not a usual one. No
        text is ever encoded as this token.
      bos_token: the token for the beginning of a text, where its post-processor puts none there;
        None: the bos_token of tokenizer_config.json.
      first_token: what a text begins with. 'auto': the token that the tokenizer's post-processor
        puts there, as transformers does; else the bos_token, where tokenizer_config.json has
        add_bos_token; else end-of-text. 'bos', 'eot', 'none': that token, or nothing.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: not a tokenizer file, no end-of-text token found, or no token that `first_token`
        asks for.
      ImportError: a package that this kind needs is missing; the message names it.
    """
    if spec == "bytes":
        if eot_token is not None:
            raise ValueError("Tokenizer bytes has its own end-of-text; eot_token is for others.")
        return ByteTokenizer(first_token)
    path = download(spec, "tokenizer.json") if spec.startswith("hf:") else pathlib.Path(spec)
    if not path.is_file():
        raise FileNotFoundError(
            f"Tokenizer {spec} is no file; accepted are bytes, FILE.json (a Hugging Face "
            "tokenizer.json) and hf:NAME."
        )
    try:
        json = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Tokenizer {spec} is not a text file: {error}.") from error
    is_asked = first_token in ("auto", "bos")
    if bos_token is None and (is_asked or not spec.startswith("hf:")):
        file = find_file(spec, SETTINGS)
        settings = read_settings(file)
        bos_token = named_token(settings, "bos_token", file)
        if is_asked and bos_token is not None and settings.get("add_bos_token") is True:
            first_token = "bos"
    return HuggingFaceTokenizer(spec, json, eot_token, bos_token, first_token)
