"""Training a tokenizer: byte-level BPE, as GPT-2's."""

from collections.abc import Iterable

EOT_TOKEN = "<|endoftext|>"
MIN_VOCABULARY = 257  # the bytes and end-of-text


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> str:
    """Return a tokenizer of at most `vocab_size` tokens, as the content of a tokenizer.json.

    Args:
      texts: UTF-8 texts to train on.
      vocab_size: number of tokens, which are the bytes, end-of-text and merges; at least 257.

    Raises:
      ValueError: `vocab_size` is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCABULARY:
        raise ValueError(
            f"The vocabulary of a tokenizer must be at least {MIN_VOCABULARY} tokens; got "
            f"{vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode() for text in texts), trainer)
    return tokenizer.to_str()
