"""Tokenizers of Hugging Face's `tokenizers` library, with special tokens that no text can spell."""

import functools
import hashlib
import json
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np

from flowhn_jax.data.first_token import check_first_token
from flowhn_jax.data.library_errors import errors_as_value_error, hide_panic_output
from flowhn_jax.data.tokenizer_config import SETTINGS
from flowhn_jax.utils.limits import MAX_INT
from flowhn_jax.utils.text import short_list, short_repr

# Common end-of-text tokens, most likely first.
_EOT_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001  DeepSeek's, with these characters
)


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library.

    Special tokens are neither added to a text nor recognized in it. End-of-text and the token that
    begins a text cannot be spelled at all: the tokenizer that encodes knows them by random names,
    so that their usual spelling is encoded like any other text. If the file also uses the id of
    one of them for unknown text, unknown text is dropped. Truncation and padding are disabled,
    whatever the file says.

    Attributes:
      spec, vocab_size, eot_id, eot_token, bos_token, first_token, first_ids, fingerprint: as in
        `tokenizer.Tokenizer`.
      json: the content of tokenizer.json.
      rule: what tokenizer.json itself begins a text with: 'bos', 'eot' or 'several' tokens.
    """

    def __init__(
        self,
        spec: str,
        json: str,
        eot_token: str | None = None,
        bos_token: str | None = None,
        first_token: str = "auto",
    ):
        """Make a tokenizer from the content of a tokenizer.json; see `tokenizer.load_tokenizer`."""
        try:
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"Tokenizer {spec} needs the package 'tokenizers': pip install tokenizers"
            ) from error
        library = _load(spec, json)
        vocabulary = library.get_vocab()
        self.spec = spec
        self.json = json
        self.eot_token = _find_eot(spec, vocabulary, eot_token)
        self.eot_id: int = vocabulary[self.eot_token]
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > MAX_INT:
            raise ValueError(
                f"The ids of tokenizer {spec} must be at most {MAX_INT - 1}; "
                f"got {self.vocab_size - 1}."
            )
        leading = _leading_ids(spec, library)
        if len(leading) == 1:
            bos_token = library.id_to_token(leading[0])
        self.bos_token = bos_token if bos_token in vocabulary else None
        single = "bos" if leading and leading[0] != self.eot_id else "eot"
        self.rule = "several" if len(leading) > 1 else single
        self.first_token = self._resolve_first_token(first_token)
        bos_id = vocabulary.get(self.bos_token)
        choices = {"bos": (bos_id,), "eot": (self.eot_id,), "none": ()}
        self.first_ids: tuple[int, ...] = choices[self.first_token]
        if self.first_ids == (self.eot_id,):
            self.first_token = "eot"  # one token may be both
        self.fingerprint = hashlib.sha256(f"{json}\n{self.eot_token}".encode()).hexdigest()
        self._hidden_ids = {self.eot_id, *self.first_ids}
        hidden = {token for token, i in vocabulary.items() if i in self._hidden_ids}
        with errors_as_value_error(f"Tokenizer {spec} cannot be read"):
            content = _with_secret_names(json, hidden)
        self._tokenizer = _load(spec, content)
        self._tokenizer.encode_special_tokens = True

    @functools.cached_property
    def _parser(self) -> Any:
        """The library's tokenizer that recognizes special tokens in a text."""
        return _load(self.spec, self.json)

    def _resolve_first_token(self, first_token: str) -> str:
        """Return what a text begins with: 'bos', 'eot' or 'none'."""
        check_first_token(first_token)
        resolved = self.rule if first_token == "auto" else first_token
        if resolved == "several":
            raise ValueError(
                f"Tokenizer {self.spec} begins a text with several tokens, but only one is "
                "supported; type --first_token=bos or --first_token=eot"
            )
        if resolved == "bos" and self.bos_token is None:
            raise ValueError(
                f"Tokenizer {self.spec} has no beginning-of-text token: its post_processor adds "
                f"none, and {SETTINGS} has no usable bos_token; type --first_token=eot"
            )
        return resolved

    def encode(self, text: str | bytes, *, parse_special: bool = False) -> np.ndarray:
        """Return the ids of a text, int32 [T], without `first_ids`.

        Args:
          text: a string, or UTF-8 bytes.
          parse_special: whether the names of special tokens in the text become these tokens.

        Raises:
          UnicodeDecodeError: the bytes are not UTF-8.
          ValueError: the library fails on this text.
        """
        text = text if isinstance(text, str) else text.decode()
        library = self._parser if parse_special else self._tokenizer
        with (
            errors_as_value_error(f"Tokenizer {self.spec} cannot encode a text"),
            hide_panic_output(),
        ):
            # Only the batched call skips the offsets, which cost as much as the ids.
            (encoding,) = library.encode_batch_fast([text], add_special_tokens=False)
            ids = np.array(encoding.ids, np.int32)
        if parse_special:
            return ids
        for hidden in self._hidden_ids:
            ids = ids[ids != hidden]  # where they remain, they stand for unknown text
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, including special tokens other than `eot_id` and `first_ids`.

        Raises:
          ValueError: the library fails on these ids.
        """
        visible = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._hidden_ids]
        with (
            errors_as_value_error(f"Tokenizer {self.spec} cannot decode {len(visible)} ids"),
            hide_panic_output(),
        ):
            return self._tokenizer.decode(visible, skip_special_tokens=False)

    def beginning_with(self, first_token: str) -> "HuggingFaceTokenizer":
        """Return this tokenizer with another first token; 'auto' changes nothing."""
        if first_token in ("auto", self.first_token):
            return self
        return HuggingFaceTokenizer(
            self.spec, self.json, self.eot_token, self.bos_token, first_token
        )

    def __reduce__(self):
        # The library's own pickling loses `encode_special_tokens`.
        arguments = self.spec, self.json, self.eot_token, self.bos_token, self.first_token
        return HuggingFaceTokenizer, arguments


def _leading_ids(spec: str, library: Any) -> list[int]:
    """Return the ids that a tokenizer's post-processor adds before a text."""
    import tokenizers

    if library.post_processor is None:
        return []
    word = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    text = tokenizers.Tokenizer(word).encode("a")
    with errors_as_value_error(f"Tokenizer {spec} cannot be read"), hide_panic_output():
        processed = library.post_processor.process(text)
    added = processed.special_tokens_mask
    return processed.ids[: added.index(0)] if 0 in added else []


def _load(spec: str, content: str) -> Any:
    """Return the library's tokenizer for a tokenizer.json, without truncation and padding."""
    import tokenizers

    what = f"Tokenizer {spec} is not a Hugging Face tokenizer.json"
    with errors_as_value_error(what), hide_panic_output():
        library = tokenizers.Tokenizer.from_str(content)
        library.no_truncation()
        library.no_padding()
    return library


def _with_secret_names(content: str, tokens: set[str]) -> str:
    """Return a tokenizer.json in which `tokens` have random names and unchanged ids.

    Removing them from the vocabulary is no alternative: the library numbers added tokens by the
    size of the vocabulary.
    """
    names = {token: secrets.token_hex(16) for token in tokens}
    fields = json.loads(content)
    model = fields["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:  # Unigram: a list of tokens with scores
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
    """Return whether a BPE merge joins or produces one of `tokens`."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return bool(tokens & {left, right, left + right.removeprefix(prefix)})


def _find_eot(spec: str, vocabulary: dict[str, int], eot_token: str | None) -> str:
    """Return the end-of-text token: `eot_token`, or else the likeliest of the usual ones."""
    if eot_token is not None:
        if eot_token not in vocabulary:
            raise ValueError(
                f"eot_token must be in the vocabulary of tokenizer {spec}; "
                f"got {short_repr(eot_token)}."
            )
        if len(eot_token) == 1:
            raise ValueError(
                "eot_token must not be a single character, which a text may need; got "
                f"{eot_token!r} for tokenizer {spec}."
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
        f"type --eot_token=TOKEN. Candidates in its vocabulary: {short_list(special) or 'none'}."
    )
