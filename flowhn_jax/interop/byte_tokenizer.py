"""The byte tokenizer as a tokenizer.json, for models that were trained on bytes."""

import json
from typing import Any

from flowhn_jax.data.library_errors import errors_as_value_error, hide_panic_output
from flowhn_jax.data.prepared import TOKENIZER
from flowhn_jax.data.tokenizer import ByteTokenizer
from flowhn_jax.data.tokenizer_config import OWN_SETTINGS

EOT_TOKEN = "<|endoftext|>"


def to_json(tokenizer: ByteTokenizer) -> str:
    """Return a tokenizer.json with the ids of `tokenizer`: bytes, and end-of-text.

    It is a byte-level BPE without merges. What begins a text is added by its post-processor.
    """
    vocabulary = {character: byte for byte, character in enumerate(_characters())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    found = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": tokenizer.eot_id,
                "content": EOT_TOKEN,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": False},
        "post_processor": _post_processor(tokenizer),
        "decoder": byte_level | {"use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def is_bytes(content: str) -> bool:
    """Return whether a tokenizer.json is that of `ByteTokenizer()`, written here or by a library.

    Raises:
      ValueError: the tokenizers library cannot read it.
    """
    ours = to_json(ByteTokenizer())
    if content == ours:
        return True
    with errors_as_value_error(f"{TOKENIZER} cannot be read"), hide_panic_output():
        import tokenizers

        theirs, again = (tokenizers.Tokenizer.from_str(text) for text in (content, ours))
        return (
            theirs.get_vocab_size() == again.get_vocab_size() and theirs.to_str() == again.to_str()
        )


def settings(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """Return the content of tokenizer_config.json."""
    first = {OWN_SETTINGS: {"first_token": tokenizer.first_token}}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": EOT_TOKEN,
        **({"bos_token": EOT_TOKEN} if tokenizer.first_ids else first),
    }


def _characters() -> list[str]:
    """Return the character that stands for each byte in byte-level vocabularies (GPT-2's)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _post_processor(tokenizer: ByteTokenizer) -> dict[str, Any] | None:
    if not tokenizer.first_ids:
        return None
    first = {"SpecialToken": {"id": EOT_TOKEN, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    token = {"id": EOT_TOKEN, "ids": list(tokenizer.first_ids), "tokens": [EOT_TOKEN]}
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, b],
        "special_tokens": {EOT_TOKEN: token},
    }
