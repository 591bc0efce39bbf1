"""Targets with odd tokenizers: files that load, but may fail on texts or ids.

Each target changes parts of one of a few small tokenizers, and makes a command encode documents,
prompts or task items with it, or decode ids from all over the vocabulary.
"""

import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

from tools.fuzz import mutations, patch_points, seeds
from tools.fuzz.child import Case, Sandbox
from tools.fuzz.programs import module, script
from tools.fuzz.target import VALID, Target

_EVAL = script("eval.py", patch_points.for_eval)
_PREPARE = module("flowhn_jax.data.prepare")
_IMPORT = module("flowhn_jax.interop")

_REGEXES = ("", "(", "[", "a*", "(?=e)", "(?<=a)b", r"\p{L}+|", r"\p{Nope}", r"\b", "^", ".",
            r"\s+", "(a|a)*$", "(?i)É", r"[^\S\n]+", r"\x{10ffff}", "\\",
            "(?:x{0,100}){0,100}")  # fmt: skip
_TEXTS = ("", " ", "\n", "a", "▁", "Ġ", "<0x41>", "<|endoftext|>", "é", "\0", "x" * 10_000, "the")


def _pattern(rng: random.Random) -> dict[str, str]:
    if rng.random() < 0.7:
        return {"Regex": rng.choice(_REGEXES)}
    return {"String": rng.choice(_TEXTS)}


def _normalizer(rng: random.Random) -> Any:
    content = rng.choice(_TEXTS)
    return rng.choice((
        {"type": "Replace", "pattern": _pattern(rng), "content": content},
        {"type": "Prepend", "prepend": content},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Precompiled", "precompiled_charsmap": rng.choice(("", "AAAA", "gAAAAAAA"))},
        {"type": rng.choice(("NFD", "NFKC", "Nmt", "Lowercase", "StripAccents", "ByteLevel"))},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
         "strip_accents": None, "lowercase": True},
    ))  # fmt: skip


def _pre_tokenizer(rng: random.Random) -> Any:
    behavior = rng.choice(("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext",
                           "Contiguous"))  # fmt: skip
    return rng.choice((
        {"type": "Split", "pattern": _pattern(rng), "behavior": behavior,
         "invert": rng.random() < 0.3},
        {"type": "Metaspace", "replacement": rng.choice(("▁", " ", "a")), "split": True,
         "prepend_scheme": rng.choice(("always", "never", "first"))},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": behavior},
        {"type": "FixedLength", "length": rng.choice((0, 1, 5, 2**40))},
        {"type": rng.choice(("Whitespace", "WhitespaceSplit", "UnicodeScripts"))},
        {"type": "CharDelimiterSplit", "delimiter": rng.choice(("a", " ", "\n"))},
    ))  # fmt: skip


def _decoder(rng: random.Random) -> Any:
    content = rng.choice(_TEXTS)
    return rng.choice((
        {"type": rng.choice(("ByteFallback", "Fuse", "ByteLevel"))},
        {"type": "Strip", "content": rng.choice((" ", "a", "▁")),
         "start": rng.choice((0, 1, 2**40)), "stop": rng.choice((0, 1, 2**40))},
        {"type": "Replace", "pattern": _pattern(rng), "content": content},
        {"type": "WordPiece", "prefix": content, "cleanup": True},
        {"type": "CTC", "pad_token": content, "word_delimiter_token": "|", "cleanup": True},
        {"type": "BPEDecoder", "suffix": content},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    ))  # fmt: skip


def _post_processor(rng: random.Random) -> Any:
    token = rng.choice((*_TEXTS, "[CLS]"))
    number = rng.choice((0, 1, 299, 10**6, 2**32 - 1))
    return rng.choice((
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        {"type": "BertProcessing", "sep": [token, number], "cls": [token, number]},
        {"type": "RobertaProcessing", "sep": [token, number], "cls": [token, number],
         "trim_offsets": True, "add_prefix_space": True},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": token, "type_id": 0}},
                                                  {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}}},
    ))  # fmt: skip


_PARTS: dict[str, Callable[[random.Random], Any]] = {
    "normalizer": _normalizer,
    "pre_tokenizer": _pre_tokenizer,
    "decoder": _decoder,
    "post_processor": _post_processor,
}


def _change_part(rng: random.Random, fields: dict[str, Any]) -> str:
    """Replace or extend the normalizer, pre-tokenizer, decoder or post-processor."""
    name = rng.choice(list(_PARTS))
    new = _PARTS[name](rng)
    listed = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers",
              "decoder": "decoders", "post_processor": "processors"}[name]  # fmt: skip
    if fields.get(name) and rng.random() < 0.5:
        new = {"type": "Sequence", listed: [fields[name], new]}
    fields[name] = new
    return f"{name} {json.dumps(new):.200}"


def _change_vocabulary(rng: random.Random, fields: dict[str, Any]) -> str:
    """Remove, rename or duplicate tokens, or change their ids."""
    model = fields["model"]
    vocabulary, how = model["vocab"], rng.choice(("delete", "id", "rename", "huge"))
    for _ in range(rng.choice((1, 1, 5, 100))):
        if isinstance(vocabulary, list):  # Unigram's
            place = rng.randrange(len(vocabulary))
            score = rng.choice((0.0, -1e300, 1e300, -3.0))
            text = rng.choice(_TEXTS) if how == "rename" else vocabulary[place][0]
            vocabulary[place] = [text, score]
            continue
        token = rng.choice(list(vocabulary))
        if how == "delete":
            del vocabulary[token]
        elif how == "rename":
            vocabulary[rng.choice(_TEXTS)] = vocabulary.pop(token)
        else:
            most = (0, 5, 319) if how == "id" else (320, 10**6, 2**31, 2**32 - 1)
            vocabulary[token] = rng.choice(most)
    return f"vocabulary {how}"


def _change_model(rng: random.Random, fields: dict[str, Any]) -> str:
    """Change an option of the model, or drop half of the merges."""
    model = fields["model"]
    if "merges" in model and rng.random() < 0.3:
        model["merges"] = rng.sample(model["merges"], len(model["merges"]) // 2)
        return "half the merges"
    name, values = rng.choice(
        (
            ("unk_token", (None, *_TEXTS)),
            ("unk_id", (None, 0, 1, 299, 2**40)),
            ("byte_fallback", (True, False)),
            ("fuse_unk", (True, False)),
            ("ignore_merges", (True, False)),
            ("dropout", (0.0, 0.5, 1.0, 2.0, -1.0)),
            ("continuing_subword_prefix", (None, "", "##", "é", "x" * 10_000)),
            ("end_of_word_suffix", (None, "", "</w>", "é")),
            ("max_input_chars_per_word", (0, 1, 2**40)),
        )
    )
    model[name] = rng.choice(values)
    return f"{name} {model[name]!r:.40}"


def _change_added_tokens(rng: random.Random, fields: dict[str, Any]) -> str:
    """Add tokens that the library finds in texts: short, huge, or with ids in use."""
    texts = (*_TEXTS, "x", "x" * 1_000_000)
    for _ in range(rng.choice((1, 1, 2, 30))):
        number = rng.choice((0, 1, 299, 300, 301, 319, 320, 10**6, 2**32 - 1))
        token = {"id": number, "content": rng.choice(texts)}
        options = ("single_word", "lstrip", "rstrip", "normalized", "special")
        fields["added_tokens"].append(token | {name: rng.random() < 0.5 for name in options})
    return f"added token {token['id']} {token['content']!r:.40}"


def _change_lengths(rng: random.Random, fields: dict[str, Any]) -> str:
    """Set truncation and padding, which our code must ignore."""
    length = rng.choice((0, 1, 5, 2**40))
    fields["truncation"] = {"direction": "Right", "max_length": length, "strategy": "LongestFirst",
                            "stride": rng.choice((0, 9))}  # fmt: skip
    fields["padding"] = {"strategy": {"Fixed": min(length, 1000)}, "direction": "Left", "pad_id": 7,
                         "pad_to_multiple_of": rng.choice((None, 0, 8)), "pad_type_id": 0,
                         "pad_token": "<|endoftext|>"}  # fmt: skip
    return f"truncation and padding to {length}"


_CHANGES = (_change_part,) * 4 + (
    _change_vocabulary,
    _change_model,
    _change_added_tokens,
    _change_lengths,
)


def _odd(rng: random.Random, sandbox: Sandbox, path: str) -> str:
    """Write a changed tokenizer to a path of the working folder; return the changes."""
    found = sorted((sandbox.work / "tokenizers").iterdir())
    chosen: pathlib.Path = rng.choice(found)
    fields = json.loads(chosen.read_text())
    changes = 0 if rng.random() < VALID else rng.choice((1, 1, 1, 2, 3))
    notes = [rng.choice(_CHANGES)(rng, fields) for _ in range(changes)]
    if rng.random() < 0.1:
        fields, note = mutations.change(rng, fields)
        notes.append(note)
    (sandbox.work / path).write_text(mutations.dumps(fields))
    return "; ".join([chosen.stem, *notes]) if notes else ""


def _prepares(rng: random.Random, sandbox: Sandbox) -> Case:
    note = _odd(rng, sandbox, "tokenizer.json")
    arguments = ["--source=docs.jsonl", "--tokenizer=tokenizer.json", "--out=out", "--context=32"]
    return Case(_PREPARE, [*arguments, "--workers=1"], note)


def _evaluates(rng: random.Random, sandbox: Sandbox) -> Case:
    """Use an imported run's odd tokenizer on a text, prompts or tasks."""
    note = _odd(rng, sandbox, "run/tokenizer.json")
    settings = json.dumps({"eos_token": "<|endoftext|>"})
    (sandbox.work / "run/tokenizer_config.json").write_text(settings)
    mode = rng.choice(
        (
            ["--mode=perplexity", "--data=text.txt"],
            ["--mode=generate", f"--prompts={rng.choice(('prompts.txt', 'prompts.jsonl'))}"],
            ["--mode=generate", "--prompt=The door — 海", "--stop=ing"],
            ["--mode=tasks", f"--tasks={rng.choice(seeds.TASKS)}", "--task_dir=."],
        )
    )
    return Case(_EVAL, ["--workdir=run", *mode], note)


def _imports(rng: random.Random, sandbox: Sandbox) -> Case:
    note = _odd(rng, sandbox, "source/tokenizer.json")
    return Case(_IMPORT, ["import", "--source=source", "--workdir=new"], note)


TARGETS = {
    "odd_tokenizer_prepare": Target(("jsonl", "tokenizers"), _prepares),
    "odd_tokenizer_eval": Target(
        ("run", "text", "prompts", "tasks", "tokenizers"), _evaluates, 2.0
    ),
    "odd_tokenizer_import": Target(("ours", "tokenizers"), _imports, 0.2),
}
