"""Tokenizers: text to token ids and back."""

import hashlib
import json
import pathlib
import secrets
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from flowhn_jax.data.native import failures_as_value_error, panics_unprinted
from flowhn_jax.limits import MOST
from flowhn_jax.messages import listed, shown

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


class Tokenizer(Protocol):
    """What every tokenizer offers.

    Attributes:
      spec: what `load_tokenizer` was given.
      vocab_size: all ids are below it.
      eot_id: the id that stands before and after every document.
      eot_token: its text in the vocabulary, None where it has none.
      fingerprint: equal for two tokenizers exactly where they are the same.
    """

    spec: str
    vocab_size: int
    eot_id: int
    eot_token: str | None
    fingerprint: str

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids, int32 [T], of a text (bytes are UTF-8); none of them is `eot_id`."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; end-of-text, and ids that the vocabulary lacks, are left out."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as end-of-text."""

    spec = "bytes"
    vocab_size = 257
    eot_id = 256
    eot_token = None
    fingerprint = "bytes"

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids, int32 [T]: the bytes of the text."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library.

    No special token is ever added, and none is looked for in a text. The end-of-text token cannot
    be spelled either: the tokenizer that encodes knows it under a random name, so that its text is
    encoded as any other text. Where a file gives end-of-text's id to unknown text as well, unknown
    text has no ids. Truncation and padding that the file may ask for are off.
    """

    def __init__(self, spec: str, json: str, eot_token: str | None = None):
        """`json` is the content of a tokenizer.json; see `load_tokenizer` for the rest."""
        try:
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"Tokenizer {spec} needs the package 'tokenizers' (pip install tokenizers)."
            ) from error
        vocabulary = _load(spec, json).get_vocab()
        self.spec = spec
        self.json = json
        self.eot_token = _find_eot(spec, vocabulary, eot_token)
        self.eot_id = vocabulary[self.eot_token]
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > MOST:
            raise ValueError(
                f"Tokenizer {spec} has id {self.vocab_size - 1}; the most is {MOST - 1}."
            )
        self.fingerprint = hashlib.sha256(f"{json}\n{self.eot_token}".encode()).hexdigest()
        ends = {token for token, i in vocabulary.items() if i == self.eot_id}
        with failures_as_value_error(f"Tokenizer {spec} cannot be read"):
            encoding = _with_secret_names(json, ends)
        self._tokenizer = _load(spec, encoding)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids, int32 [T].

        Raises:
          UnicodeDecodeError: bytes that are not UTF-8.
          ValueError: the library fails on this text.
        """
        text = text if isinstance(text, str) else text.decode()
        with (
            failures_as_value_error(f"Tokenizer {self.spec} cannot encode a text"),
            panics_unprinted(),
        ):
            # The batched call alone skips the offsets, which cost as much as the ids.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            ids = np.array(encoding.ids, np.int32)
        return ids[ids != self.eot_id]  # what is left is unknown text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens other than end-of-text included.

        Raises:
          ValueError: the library fails on these ids.
        """
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.eot_id]
        with (
            failures_as_value_error(f"Tokenizer {self.spec} cannot decode {len(kept)} ids"),
            panics_unprinted(),
        ):
            return self._tokenizer.decode(kept, skip_special_tokens=False)

    def __reduce__(self):
        # The library's own pickling forgets that special tokens are plain text.
        return HuggingFaceTokenizer, (self.spec, self.json, self.eot_token)


def _load(spec: str, content: str) -> Any:
    """Return the library's tokenizer of a tokenizer.json."""
    import tokenizers

    what = f"Tokenizer {spec} is not a Hugging Face tokenizer.json"
    with failures_as_value_error(what), panics_unprinted():
        return tokenizers.Tokenizer.from_str(content)


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
                f"Tokenizer {spec} has no token {shown(eot_token)} to end a text with."
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
        f"name its own as eot_token. What looks like one: {listed(special) or 'nothing'}."
    )


def _download(spec: str) -> pathlib.Path:
    """The tokenizer.json of 'hf:NAME', in the Hugging Face cache."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"Tokenizer {spec} needs the package 'huggingface_hub' (pip install huggingface_hub)."
        ) from error
    try:
        return pathlib.Path(
            huggingface_hub.hf_hub_download(spec.removeprefix("hf:"), "tokenizer.json")
        )
    except Exception as error:  # network, absent repository, absent file, bad name
        raise ValueError(f"Tokenizer {spec}: tokenizer.json cannot be fetched: {error}") from error


def load_tokenizer(spec: str, eot_token: str | None = None) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      spec: 'bytes'; the path of a Hugging Face tokenizer.json; or 'hf:NAME', a repository of the
        Hugging Face hub that has one (the only case that may use the network).
      eot_token: the end-of-text token of a Hugging Face tokenizer, where it is not a usual one. No
        text is ever encoded as this token.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: not a tokenizer file, or no end-of-text token found.
      ImportError: a package that this kind needs is missing; the message names it.
    """
    if spec == "bytes":
        if eot_token is not None:
            raise ValueError("Tokenizer bytes has its own end-of-text; eot_token is for others.")
        return ByteTokenizer()
    path = _download(spec) if spec.startswith("hf:") else pathlib.Path(spec)
    if not path.is_file():
        raise FileNotFoundError(
            f"Tokenizer {spec} is no file; accepted are bytes, FILE.json (a Hugging Face "
            "tokenizer.json) and hf:NAME."
        )
    try:
        json = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Tokenizer {spec} is not a text file: {error}.") from error
    return HuggingFaceTokenizer(spec, json, eot_token)
