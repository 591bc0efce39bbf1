"""Valid inputs to damage: small files of each kind, made once per campaign."""

import dataclasses
import gzip
import json
import os
import pathlib
import shutil
import sys
import traceback
from collections.abc import Callable

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.data.prepare import prepare
from flowhn_jax.interop import huggingface
from tools.fuzz import measured

CONTEXT = 32
_MODEL = {
    "vocab_size": 320,
    "context": CONTEXT,
    "width": 16,
    "mlp_width": 16,
    "blocks": 2,
    "heads": 4,
    "kv_heads": 2,
}
_FLOWHN = {"ssm_state": 4, "split": {"strategy": "fai_split", "period": 16}}
_TRAIN = {"batch_size": 4, "steps": 2, "checkpoint_every": 1}
RECIPE = f"""
from flowhn_jax import config as config_lib

def get_config(strategy="fai_split"):
    config = config_lib.default()
    config.model.update({_MODEL | _FLOWHN!r})
    config.model.split.strategy = strategy
    config.train.update({_TRAIN!r})
    config.data.path = "set"
    return config
"""
_TASKS = {
    "boolq": {"Query": "Is water wet?\nAnswer:", "Choices": [" no", " yes"], "label": 1},
    "piqa": {"goal": "To open a door", "sol1": "push it", "sol2": "eat it", "label": 0},
    "lambada": {"text": "The quick brown fox jumps over the lazy dog"},
    "arc_easy": {
        "question": {
            "stem": "Which is a fruit?",
            "choices": [{"text": "apple", "label": "A"}, {"text": "stone", "label": "B"}],
        },
        "answerKey": "A",
    },
    "arc_challenge": {
        "question": "Which is a fruit?",
        "choices": {"text": ["apple", "stone"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "winogrande": {"sentence": "A cat chased a dog, as _ was fast.", "option1": "cat",
                   "option2": "dog", "answer": "1"},
    "hellaswag": {"activity_label": "Cooking", "ctx_a": "A man", "ctx_b": "he",
                  "endings": ["cooks.", "[title] eats.", "flies.", "is."], "label": "0"},
}  # fmt: skip


def make(folder: pathlib.Path, names: set[str]) -> None:
    """Make the named inputs, each in its own folder, in a child process.

    The child process is needed because the parent must not start JAX before it forks.

    Raises:
      RuntimeError: the child failed and printed why.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            for name in SEEDS:
                (folder / name).mkdir(parents=True)
            for name in names:
                SEEDS[name](folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the valid inputs could not be made; the traceback is above.")


def documents() -> list[str]:
    """Return texts whose characters have one to three bytes."""
    text = "the door of a house by the sea was open, and nobody said a word"
    lines = [text[number % 7 :: 1 + number % 3] for number in range(60)]
    return [f"{number}: {line} — Ægir, 海." for number, line in enumerate(lines)]


def _recipe(folder: pathlib.Path) -> None:
    (folder / "recipe/recipe.py").write_text(RECIPE)


def _text(folder: pathlib.Path) -> None:
    (folder / "text/text.txt").write_text("\n".join(documents()))


def _jsonl(folder: pathlib.Path) -> None:
    lines = "".join(json.dumps({"text": each, "n": 1}) + "\n" for each in documents())
    (folder / "jsonl/docs.jsonl").write_text(lines)


def _gzip(folder: pathlib.Path) -> None:
    lines = "".join(json.dumps({"text": each}) + "\n" for each in documents())
    (folder / "gzip/docs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def _zstd(folder: pathlib.Path) -> None:
    import zstandard

    lines = "".join(json.dumps({"text": each}) + "\n" for each in documents())
    (folder / "zstd/docs.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))


def _parquet(folder: pathlib.Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": documents(), "n": list(range(60))})
    parquet.write_table(table, folder / "parquet/docs.parquet")


def _tokenizer(folder: pathlib.Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(documents(), trainer)
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))


def _tokenizers(folder: pathlib.Path) -> None:
    """Write four tokenizers: byte-level BPE, BPE with byte fallback, Unigram and WordPiece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    _tokenizer(folder)
    (folder / "tokenizers/tokenizers").mkdir()
    shutil.copy(
        folder / "tokenizer/tokenizer.json", folder / "tokenizers/tokenizers/byte_level.json"
    )
    settings = {"vocab_size": 300, "show_progress": False}
    eot = "<|endoftext|>"

    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    fallback = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fallback.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fallback.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    specials = ["<unk>", eot, *bytes_]
    fallback.train_from_iterator(
        documents(), trainers.BpeTrainer(special_tokens=specials, **settings)
    )

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.train_from_iterator(
        documents(),
        trainers.UnigramTrainer(special_tokens=["<unk>", eot], unk_token="<unk>", **settings),
    )

    pieces = Tokenizer(models.WordPiece(unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    pieces.train_from_iterator(
        documents(), trainers.WordPieceTrainer(special_tokens=["<unk>", eot], **settings)
    )
    for name, each in (("fallback", fallback), ("unigram", unigram), ("word_piece", pieces)):
        each.save(str(folder / f"tokenizers/tokenizers/{name}.json"))


def _prepare(folder: pathlib.Path, tokenizer: str, name: str) -> None:
    if (folder / name / "set").exists():  # made for another seed
        return
    source = folder / f"{name}/docs.jsonl"
    source.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents()))
    options = dict(context=CONTEXT, validation_fraction=0.1)
    prepare(str(source), tokenizer, folder / name / "set", **options)


def _set(folder: pathlib.Path) -> None:
    _prepare(folder, "bytes", "set")


def _bpe_set(folder: pathlib.Path) -> None:
    _tokenizer(folder)
    _prepare(folder, str(folder / "tokenizer/tokenizer.json"), "bpe_set")


def _config() -> config_lib.Config:
    groups = {"model": _MODEL | _FLOWHN, "train": _TRAIN, "data": {"path": "set"}}
    return config_lib.parse(groups)


def _run(folder: pathlib.Path) -> None:
    """Write a workdir without checkpoints, for targets that stop before reading them."""
    workdir_lib.make(str(folder / "run/run"))
    workdir_lib.write_config(str(folder / "run/run"), _config())


def _trained(folder: pathlib.Path) -> None:
    from flowhn_jax.training.trainer import fit

    _set(folder)
    data = dataclasses.replace(_config().data, path=str(folder / "set/set"))
    fit(dataclasses.replace(_config(), data=data), str(folder / "trained/run"))
    workdir_lib.write_config(str(folder / "trained/run"), _config())


def _export(folder: pathlib.Path, name: str, keys: dict) -> None:
    config = config_lib.parse({"model": _MODEL | keys}).model
    _tokenizer(folder)
    huggingface.save(folder / name / "source", config, models.init(config, 0))
    tokenizer = (folder / "tokenizer/tokenizer.json").read_text()
    (folder / name / "source/tokenizer.json").write_text(tokenizer)
    settings = json.dumps({"eos_token": {"content": "<|endoftext|>"}})
    (folder / name / "source/tokenizer_config.json").write_text(settings)


def _export_ours(folder: pathlib.Path) -> None:
    _export(folder, "ours", _FLOWHN)


def _export_theirs(folder: pathlib.Path) -> None:
    """Write two shards with an index."""
    from safetensors.numpy import load_file, save_file

    _export(folder, "theirs", {"kind": "llama"})
    source = folder / "theirs/source"
    arrays = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    parts = [sorted(arrays)[part::2] for part in range(2)]
    weight_map = {}
    for number, part in enumerate(parts):
        name = f"model-{number}.safetensors"
        save_file({each: arrays[each] for each in part}, source / name)
        weight_map |= dict.fromkeys(part, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (source / "model.safetensors.index.json").write_text(index)


def _prompts(folder: pathlib.Path) -> None:
    (folder / "prompts/prompts.txt").write_text("The door\nA house — Ægir\n")
    lines = [{"prompt": "The door"}, "A house", {"prompt": "海", "n": 1}]
    (folder / "prompts/prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))


def _tasks(folder: pathlib.Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for task, record in _TASKS.items():
        lines = json.dumps(record) + "\n"
        (folder / f"tasks/{task}.jsonl").write_text(lines * 3)
    (folder / "tasks/piqa-labels.lst").write_text("0\n1\n0\n")
    (folder / "tasks/boolq.jsonl").unlink()
    parquet.write_table(pyarrow.Table.from_pylist([_TASKS["boolq"]] * 3),
                        folder / "tasks/boolq.parquet")  # fmt: skip


def _suites(folder: pathlib.Path) -> None:
    measured.write_suites(folder / "suites")


def _comparison(folder: pathlib.Path) -> None:
    (folder / "comparison/cmp").mkdir()
    measured.write_comparison(folder / "comparison/cmp")


TASKS = tuple(_TASKS)
SEEDS: dict[str, Callable[[pathlib.Path], None]] = {
    "recipe": _recipe,
    "text": _text,
    "jsonl": _jsonl,
    "gzip": _gzip,
    "zstd": _zstd,
    "parquet": _parquet,
    "tokenizer": _tokenizer,
    "tokenizers": _tokenizers,
    "set": _set,
    "bpe_set": _bpe_set,
    "run": _run,
    "trained": _trained,
    "ours": _export_ours,
    "theirs": _export_theirs,
    "prompts": _prompts,
    "tasks": _tasks,
    "suites": _suites,
    "comparison": _comparison,
}
