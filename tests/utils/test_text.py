"""No value of a user's file or flag makes a message too long to read."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from flowhn_jax import config as config_lib
from flowhn_jax.aot import topology
from flowhn_jax.checkpoints import workdir
from flowhn_jax.compare import model_configs
from flowhn_jax.data import prepared, sources
from flowhn_jax.data.shards import Shard
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation import task_files, task_formats, tasks
from flowhn_jax.interop import huggingface
from flowhn_jax.split import SplitConfig
from flowhn_jax.storage import place
from flowhn_jax.utils import typed
from flowhn_jax.utils.text import one_line, short_list, short_path, short_repr
from kernels import backends

HUGE = "x" * 100_000


@dataclasses.dataclass
class Groups:
    groups: dict[str, SplitConfig]


def index_of_version(folder):
    fields = {"format": prepared.FORMAT, "version": HUGE, "request": {}}
    (folder / prepared.INDEX).write_text(json.dumps(fields))
    prepared.PreparedSet.open(folder)


def two_files_of_a_task(folder):
    for number in range(300):
        (folder / f"{number}{'x' * 200}.jsonl").touch()
    task_files.find_file("piqa", str(folder))


def a_tokenizer_of(folder, words, eot_token=None):
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}}
    (folder / "t.json").write_text(json.dumps({"model": model | {"unk_token": words[0]}}))
    load_tokenizer(str(folder / "t.json"), eot_token)


def a_record_without_the_field(folder):
    (folder / "docs.jsonl").write_text(json.dumps({HUGE: 1, "y" * 1000: 2}) + "\n")
    list(sources.open_source(str(folder / "docs.jsonl"), HUGE).read(lambda count: None))


KINDS = {
    "version of an index": index_of_version,
    "file of an index": lambda folder: Shard(HUGE, 1, 1, "").check_name(folder),
    "name of a group in a file": lambda folder: typed.build(
        Groups, {"groups": {HUGE: 3}}, what="key"
    ),
    "numeral": lambda folder: typed.build(SplitConfig, {"balance": "9" * 100_000}, what="key"),
    "names of files": two_files_of_a_task,
    "keys of a record": a_record_without_the_field,
    "labels of a record": lambda folder: task_formats._gold(1, [HUGE, "B"]),
    "name of an array": lambda folder: huggingface.from_state_dict({HUGE: np.int32([1])}, {}),
    "end-of-text of a tokenizer": lambda folder: a_tokenizer_of(folder, ["a"], HUGE),
    "names in a vocabulary": lambda folder: a_tokenizer_of(folder, [f"<{n}{HUGE}>" for n in "ab"]),
    "--tasks": lambda folder: tasks.parse_tasks(HUGE),
    "--models": lambda folder: model_configs.parse_names(HUGE),
    "--models twice": lambda folder: model_configs.parse_names(",".join(["llama"] * 10_000)),
    "--size": lambda folder: model_configs.model_config(HUGE, "llama"),
    "--topology": lambda folder: topology.describe(HUGE),
    "split.strategy": lambda folder: SplitConfig(strategy=HUGE),
    "split.balance": lambda folder: SplitConfig(balance=HUGE),
    "split.scope": lambda folder: SplitConfig(scope=HUGE),
    "kernels.backend": lambda folder: backends.parse(HUGE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_short(tmp_path, kind):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        KINDS[kind](tmp_path)
    message = str(caught.value).replace(str(tmp_path), "")
    assert len(message) < 1000, message[:300]
    assert "\n" not in message


def test_what_to_type_is_kept():
    """What to type comes after a value of any size."""
    with pytest.raises(ValueError, match="no_split, ae_split"):
        model_configs.parse_names(HUGE)


def test_differences_between_configs():
    (line,) = config_lib.differences({"a": HUGE}, {"a": 1})
    assert line == f"a: {short_repr(HUGE)} -> 1"
    assert len(line) < 120


def test_who_holds_a_lock(tmp_path):
    """Whatever is in the lock's file, the message is short."""
    path = tmp_path / "lock"
    path.write_text(json.dumps({"pid": 12, "host": "here"}))
    assert workdir._lock_holder(place(path)) == "process 12 on host here"
    for content in (HUGE, json.dumps({"pid": HUGE, "host": "here"}), "[" * 100_000, "3"):
        path.write_text(content)
        assert workdir._lock_holder(place(path)) == "another process"
    path.write_text(json.dumps({"pid": 12, "host": HUGE}))
    assert len(workdir._lock_holder(place(path))) < 300


def test_short_repr():
    assert short_repr("text") == "'text'"
    assert short_repr(3) == "3"
    assert len(short_repr(HUGE)) == 80
    assert short_repr(10**100) == "an integer of more than 40 digits"
    assert len(short_repr({HUGE: [HUGE] * 100})) < 1000


def test_short_path():
    assert short_path(pathlib.Path("a/b")) == short_path("a/b") == "'a/b'"
    name = "x" * 253
    assert short_path(name) == f"'{name}'"
    assert len(short_path(HUGE)) < 260
    assert short_path(f"begin/{HUGE}/end").startswith("'begin/x")
    assert short_path(f"begin/{HUGE}/end").endswith("x/end'")


def test_short_list():
    assert short_list(["a", 1, "b"]) == "a, 1, b"
    assert short_list([]) == ""
    assert short_list(map(str, range(25))) == "0, 1, 2, 3, 4, 5, 6, 7 and 17 more"
    assert short_list([HUGE, "b"]) == f"{short_repr(HUGE)}, b"


def test_one_line():
    assert one_line("a\n  b") == "a b"
    text = one_line(ValueError(f"begin {HUGE} end"))
    assert text.startswith("begin xx")
    assert text.endswith("xx end")
    assert len(text) < 1010
