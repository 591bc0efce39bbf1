"""Small tokenizers of every kind, made with the `tokenizers` library."""

import functools
import json

_CORPUS = [
    "the cat sat on the mat and the dog ran",
    "a dog and a cat </s are friends > s / <|,",
] * 50
LOSSLESS = ("unigram", "bpe_metaspace", "bpe_bytes", "bpe_bytes_prefix", "bpe_one_word", "llama")
KINDS = (*LOSSLESS, "wordlevel", "wordpiece", "bpe_whitespace")
BACKTRACKING = "a" * 60 + "b"  # exceeds the regex library's limit in "backtracking"


def _make(kind):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre.ByteLevel.alphabet()
    options = dict(special_tokens=special, show_progress=False)
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **options)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre.Metaspace(), decoders.Metaspace()
    elif kind in ("bpe_metaspace", "llama"):
        model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
        options["special_tokens"] = special + [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=340, **options)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre.Metaspace(), decoders.Metaspace()
        if kind == "llama":  # the whole text is one word
            tokenizer.train_from_iterator(_CORPUS, trainer)
            fields = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
            tokenizer = Tokenizer.from_str(json.dumps(fields))
            steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            tokenizer.normalizer = normalizers.Sequence(steps)
            return tokenizer
    elif kind in ("bpe_bytes", "bpe_bytes_prefix", "bpe_one_word"):
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "bpe_one_word"))
        tokenizer.pre_tokenizer = pre.ByteLevel(
            add_prefix_space=kind == "bpe_bytes_prefix", use_regex=kind != "bpe_one_word"
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **options)
    elif kind == "bpe_whitespace":
        tokenizer = Tokenizer(models.BPE(ignore_merges=True))
        tokenizer.pre_tokenizer = pre.WhitespaceSplit()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **options)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre.WhitespaceSplit()
        trainer = trainers.WordPieceTrainer(vocab_size=80, **options)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre.WhitespaceSplit()
        if kind == "backtracking":
            tokenizer.pre_tokenizer = pre.Split(Regex("(a+)+$"), "isolated")
        trainer = trainers.WordLevelTrainer(vocab_size=60, **options)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


@functools.cache
def _content(kind):
    return _make(kind).to_str()


def save(folder, kind, listed="special"):
    """Return the path of a tokenizer whose `</s>` is a special, ordinary or no added token."""
    fields = json.loads(_content(kind))
    for token in fields["added_tokens"]:
        token["special"] = listed == "special"
    if listed == "absent":
        fields["added_tokens"] = []
    path = folder / "t.json"
    path.write_text(json.dumps(fields))
    return path
