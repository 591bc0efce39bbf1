import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from read_back import ENVIRONMENT, content, documents, windows

from flowhn_jax.commands import prepare as command
from flowhn_jax.data import corpus, encoding, shards
from flowhn_jax.data.prepare import ShardsMissing, ensure_embedded, prepare, throughput
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.tokenizer import load_tokenizer


def expected_splits(texts, fraction):
    """Return the training and validation documents by the documented rule."""
    period = round(1 / fraction)
    held_out = [i for i in range(len(texts)) if i % period == period - 1] or [len(texts) - 1]
    return {
        "train": [text for i, text in enumerate(texts) if i not in held_out],
        "validation": [texts[i] for i in held_out],
    }


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_round_trip(tmp_path, jsonl, paragraphs, tokenizer_json, fraction, kind):
    spec = "bytes" if kind == "bytes" else str(tokenizer_json)
    made = prepare(str(jsonl), spec, tmp_path / "set", context=48, validation_fraction=fraction)
    reopened = PreparedSet.open(tmp_path / "set")
    assert reopened == made
    tokenizer = load_tokenizer(spec)
    assert reopened.tokenizer.fingerprint == tokenizer.fingerprint
    assert (reopened.vocab_size, reopened.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    for name, texts in expected_splits(paragraphs, fraction).items():
        found, split = documents(made, name), made.splits[name]
        assert found == [tokenizer.encode(text).tolist() for text in texts]
        assert [reopened.tokenizer.decode(ids) for ids in found] == texts
        assert split.documents == len(texts)
        assert split.bytes == sum(len(text.encode()) for text in texts)
        assert split.tokens == sum(map(len, found)) + len(found)
        assert split.windows == len(windows(made, name)[0]) == -(-split.tokens // 48)


def test_a_set_is_self_contained(tmp_path, jsonl, tokenizer_json):
    shutil.copy(tokenizer_json, tmp_path / "t.json")
    prepare(str(jsonl), str(tmp_path / "t.json"), tmp_path / "set", eot_token="<|pad|>")
    (tmp_path / "t.json").unlink()
    jsonl.unlink()
    moved = shutil.move(tmp_path / "set", tmp_path / "moved")
    tokenizer = PreparedSet.open(moved).tokenizer
    assert tokenizer.eot_token == "<|pad|>"
    assert tokenizer.decode(tokenizer.encode("été")) == "été"


@pytest.mark.parametrize("workers", [2, 3])
def test_the_output_does_not_depend_on_the_number_of_workers(
    tmp_path, jsonl, tokenizer_json, monkeypatch, workers
):
    arguments = str(jsonl), str(tokenizer_json)
    prepare(*arguments, tmp_path / "whole", context=32)
    monkeypatch.setattr(encoding, "GROUP_BYTES", 500)  # a dozen groups
    prepare(*arguments, tmp_path / "many", context=32, workers=workers)
    assert content(tmp_path / "whole") == content(tmp_path / "many")


def test_several_shards(tmp_path, jsonl, monkeypatch):
    whole = prepare(str(jsonl), "bytes", tmp_path / "whole", context=16)
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * 17 * 100)  # 100 windows
    made = prepare(str(jsonl), "bytes", tmp_path / "set", context=16)
    found = made.splits["train"].shards
    assert [shard.file for shard in found[:2]] == [f"train-{i:05d}.array_record" for i in (0, 1)]
    assert [shard.records for shard in found[:-1]] == [100] * (len(found) - 1)
    assert sum(shard.records for shard in found) == made.splits["train"].windows
    for split in ("train", "validation"):
        assert documents(made, split) == documents(whole, split)
    made.verify()


def test_ids_beyond_16_bits(tmp_path):
    """Token ids and segment ids may exceed 65,535."""
    import tokenizers

    model = tokenizers.models.WordLevel({"a": 0, "</s>": 70_000}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "t.json"))
    (tmp_path / "s.jsonl").write_text('{"text": "a"}\n' * 100_000)
    out = tmp_path / "set"
    made = prepare(str(tmp_path / "s.jsonl"), str(tmp_path / "t.json"), out, context=140_000)
    assert (made.vocab_size, made.eot_id) == (70_001, 70_000)
    tokens, segments = windows(made, "train")
    assert tokens[0, :4].tolist() == [70_000, 0, 70_000, 0]
    assert segments[0, -3:].tolist() == [70_000, 70_000, 70_001]
    assert len(documents(made, "train")) == 99_000


def test_a_single_document_is_split_after_a_line(tmp_path, paragraphs):
    text = "\n".join(paragraphs) + "\n"
    (tmp_path / "t.txt").write_text(text)
    made = prepare(str(tmp_path / "t.txt"), "bytes", tmp_path / "set", validation_fraction=0.2)
    (first,), (second,) = documents(made, "train"), documents(made, "validation")
    assert bytes(first + second).decode() == text
    assert bytes(first).endswith(b"\n")
    assert 0.2 * len(text) <= len(second) < 0.4 * len(text)


def test_an_equal_preparation_reuses_the_set(tmp_path, jsonl, capsys):
    arguments = dict(context=32, validation_fraction=0.1)
    made = prepare(str(jsonl), "bytes", tmp_path / "set", **arguments)
    before = (tmp_path / "set" / "index.json").stat()
    assert "already prepared" not in capsys.readouterr().err
    again = prepare(str(jsonl), "bytes", tmp_path / "set", workers=2, overwrite=True, **arguments)
    assert again == made
    assert "already prepared" in capsys.readouterr().err
    assert (tmp_path / "set" / "index.json").stat() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(context=16), "context: has 32, requested 16"),
        (dict(validation_fraction=0.2), "validation_fraction: has 0.1, requested 0.2"),
        (dict(text_field="n"), "text_field: has 'text', requested 'n'"),
    ],
)
def test_another_set_is_refused(tmp_path, jsonl, change, message):
    arguments = dict(context=32, validation_fraction=0.1)
    prepare(str(jsonl), "bytes", tmp_path / "set", **arguments)
    before = content(tmp_path / "set")
    with pytest.raises(ValueError, match=rf"another prepared set \({message}\).*--overwrite"):
        prepare(str(jsonl), "bytes", tmp_path / "set", **arguments | change)
    assert content(tmp_path / "set") == before
    assert not list(tmp_path.glob(".*"))


def test_another_source_is_refused_without_overwrite(tmp_path, jsonl, paragraphs):
    prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
    jsonl.write_text(json.dumps({"text": "other"}) + "\n" + json.dumps({"text": "more"}) + "\n")
    with pytest.raises(ValueError, match=r"another prepared set \(source: has '1 files, "):
        prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
    made = prepare(str(jsonl), "bytes", tmp_path / "set", context=32, overwrite=True)
    assert bytes(documents(made, "train")[0]) == b"other"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source.jsonl"]


def test_a_set_of_another_version_is_refused_without_overwrite(tmp_path, jsonl):
    prepare(str(jsonl), "bytes", tmp_path / "set")
    index = tmp_path / "set" / "index.json"
    index.write_text(index.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(ValueError, match="version: has 0, requested 1"):
        prepare(str(jsonl), "bytes", tmp_path / "set")
    prepare(str(jsonl), "bytes", tmp_path / "set", overwrite=True)
    PreparedSet.open(tmp_path / "set")


def test_a_damaged_set_is_refused_without_overwrite(tmp_path, jsonl):
    made = prepare(str(jsonl), "bytes", tmp_path / "set")
    folder = made.folder.local()
    known = content(folder)
    shard = folder / made.splits["train"].shards[0].file
    raw = bytearray(shard.read_bytes())
    raw[3000] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match=r"SHA-256 has changed.*--overwrite"):
        prepare(str(jsonl), "bytes", tmp_path / "set")
    prepare(str(jsonl), "bytes", tmp_path / "set", overwrite=True)
    assert content(folder) == known


@pytest.mark.parametrize("name", ["precious.txt", "index.json"])
def test_a_folder_that_is_not_a_set_is_never_overwritten(tmp_path, jsonl, name):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text('{"format": "something else"}')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="set exists and is left unchanged"):
            prepare(str(jsonl), "bytes", tmp_path / "set", overwrite=overwrite)
    assert list(content(tmp_path / "set")) == [name]
    with pytest.raises(ValueError, match=r"source\.jsonl exists and is left unchanged"):
        prepare(str(jsonl), "bytes", jsonl, overwrite=True)


def test_an_empty_folder_may_be_filled(tmp_path, jsonl):
    (tmp_path / "set").mkdir()
    prepare(str(jsonl), "bytes", tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source.jsonl"]
    assert "lock" not in content(tmp_path / "set")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(context=0), "context must be from 1 to 16777216; got 0"),
        (dict(validation_fraction=0), "validation_fraction must be above 0 and at most 0.5; got 0"),
        (dict(validation_fraction=0.6), "validation_fraction must be .*; got 0.6"),
        (dict(validation_fraction=float("nan")), "validation_fraction must be .*; got nan"),
        (dict(workers=0), "workers must be 1 or more; got 0"),
    ],
)
def test_bad_arguments(tmp_path, jsonl, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(str(jsonl), "bytes", tmp_path / "set", **arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold text"),
        ('{"text": ""}\n', "must hold text"),
        ('{"text": "a"}', "must have enough text"),
    ],
)
def test_too_little_text(tmp_path, text, message):
    (tmp_path / "s.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / "s.jsonl"), "bytes", tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_leaves_no_files(tmp_path, jsonl, workers):
    with jsonl.open("a") as file:
        file.write("not json\n")
    with pytest.raises(ValueError, match=r"source\.jsonl, line \d+ is not JSON"):
        prepare(str(jsonl), "bytes", tmp_path / "set", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]


def test_no_document_contains_end_of_text(tmp_path):
    from library_tokenizers import save

    texts = [f"strike-through: <s>old {i}</s> new" for i in range(40)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer = save(tmp_path, "unigram")
    made = prepare(str(tmp_path / "s.jsonl"), str(tokenizer), tmp_path / "set", context=32)
    assert len(documents(made, "train")) == made.splits["train"].documents == 39


def test_a_long_document_is_tokenized_as_a_whole(tmp_path, monkeypatch):
    from library_tokenizers import save

    from flowhn_jax.data import document

    monkeypatch.setattr(document, "CHUNK_BYTES", 9000)
    (tmp_path / "t.txt").write_text("the cat sat on\nthe mat " * 2000)
    path = save(tmp_path, "unigram")
    made = prepare(str(tmp_path / "t.txt"), str(path), tmp_path / "set", workers=2, context=64)
    tokenizer = load_tokenizer(str(path))
    (train,), (held_out,) = documents(made, "train"), documents(made, "validation")
    for found in (train, held_out):
        assert tokenizer.encode(tokenizer.decode(found)).tolist() == found


def _change_while_reading(monkeypatch, change):
    """Call `change` once, when the first text has been read."""
    split, pending = encoding.split_into_chunks, [change]

    def changing(tokenizer, document):
        for found in split(tokenizer, document):
            if pending:
                pending.pop()()
            yield found

    monkeypatch.setattr(encoding, "split_into_chunks", changing)


@pytest.mark.parametrize("change", ["write", "append", "replace", "remove", "add", "touch"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, change, suffix):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.{suffix}").write_text('{"text": "some words"}\n' * 200)
    changed = folder / f"{'d' if change == 'add' else 'b'}.{suffix}"

    def make_change():
        if change == "remove":
            changed.unlink()
        elif change == "touch":
            os.utime(changed)
        elif change == "replace":
            (tmp_path / "other").write_text('{"text": "more words"}\n' * 200)
            (tmp_path / "other").rename(changed)
        else:
            with changed.open("a" if change == "append" else "w") as file:
                file.write('{"text": "more words"}\n' * 200)

    _change_while_reading(monkeypatch, make_change)
    with pytest.raises(ValueError, match=rf"{changed.name} must not change while it is prepared"):
        prepare(str(folder), "bytes", tmp_path / "set", context=32)
    assert not (tmp_path / "set").exists()
    prepare(str(folder), "bytes", tmp_path / "set", context=32)


@pytest.mark.parametrize(
    ("sizes", "fraction", "warning"),
    [
        ([4000] * 100, 0.01, ""),
        ([4000] * 4, 0.25, ""),
        (
            [4000] * 4,
            0.01,
            "--validation_fraction=0.01 requests 0.01 of the text, but 1 document, 4,001 tokens, "
            "0.25 of the text are held out, because only whole documents or lines are; prepare "
            "more and shorter documents, or type --validation_fraction=0.25 if this",
        ),
        (
            [90_000] * 50 + [1200],
            0.01,
            "--validation_fraction=0.01 requests 0.01 of the text, but 1 doc",
        ),
        ([12], 0.01, "only 1 document, 2 tokens, 0.083 of the text are held out; pr"),
        ([12], 0.01, "needs at least 1,000 tokens, but"),
        ([50] * 100, 0.01, "type --validation_fraction=0.4, or prepare more text."),
    ],
)
def test_an_unsuitable_validation_split_causes_a_warning(
    tmp_path, capsys, sizes, fraction, warning
):
    texts = "".join(json.dumps({"text": "a" * size}) + "\n" for size in sizes)
    (tmp_path / "s.jsonl").write_text(texts)
    for _ in range(2):  # prepared, and reused
        arguments = dict(context=32, validation_fraction=fraction)
        made = prepare(str(tmp_path / "s.jsonl"), "bytes", tmp_path / "set", **arguments)
        err = capsys.readouterr().err
        assert warning in err
        assert err.count("warning: ") == bool(warning)
    if "type --validation_fraction=" in warning:
        typed = float(warning.split("type --validation_fraction=")[1].split()[0].strip(","))
        arguments["validation_fraction"] = typed
        made = prepare(str(tmp_path / "s.jsonl"), "bytes", tmp_path / "again", **arguments)
        assert made.splits["validation"].tokens >= 1000
        assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_library_error_is_one_line(tmp_path, workers):
    from library_tokenizers import BACKTRACKING, save

    texts = ["a b", BACKTRACKING, "b"]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    path = save(tmp_path, "backtracking")
    arguments = (f"--source={tmp_path / 's.jsonl'}", f"--tokenizer={path}", f"--workers={workers}")
    done = run(*arguments, f"--out={tmp_path / 'set'}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "s.jsonl, line 2: Tokenizer" in done.stderr
    assert "t.json cannot encode a text: Onig" in done.stderr
    assert not (tmp_path / "set").exists()


def test_embedded(tmp_path, monkeypatch, capsys):
    texts = {f"{i:03d}.py": f"# file {i}\n".encode() * 20 for i in range(100)}
    monkeypatch.setattr(corpus, "embedded_documents", lambda: texts)
    made = ensure_embedded(tmp_path / "set", 64)
    assert (made.context, made.tokenizer.spec) == (64, "bytes")
    assert [bytes(ids) for ids in documents(made, "validation")] == list(texts.values())[24::25]
    texts["new.py"] = b"the next version of Python\n"
    assert ensure_embedded(tmp_path / "set", 64) == made  # a run continues with its own data
    with pytest.raises(ValueError, match="context: has 64, requested 32"):
        ensure_embedded(tmp_path / "set", 32)
    with pytest.raises(ValueError, match="source: has 'embedded corpus of Python"):
        prepare("embedded", "bytes", tmp_path / "set", context=64, validation_fraction=0.04)


def run(*arguments):
    """Run the command line in a process."""
    return subprocess.run(
        [sys.executable, "-m", "flowhn_jax.data.prepare", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


def test_command_line(tmp_path, jsonl, paragraphs, tokenizer_json):
    arguments = (f"--source={jsonl}", f"--tokenizer={tokenizer_json}", f"--out={tmp_path / 'set'}")
    first = run(*arguments, "--context=32", "--workers=2", "--validation_fraction=0.1")
    assert first.returncode == 0, first.stderr
    assert "\r" not in first.stderr
    made = PreparedSet.open(tmp_path / "set")
    assert f"{made.splits['train'].tokens:,} tokens" in first.stdout
    assert made.context == 32
    assert len(documents(made, "validation")) == len(paragraphs) // 10
    again = run(*arguments, "--context=32", "--validation_fraction=0.1")
    assert again.returncode == 0
    assert "already prepared" in again.stderr
    refused = run(*arguments)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=absent"], "Source absent does not exist"),
        (["--source={dir}"], "must hold a file of the kinds .txt, .jsonl"),
        (["--source={dir}/bad.jsonl"], "bad.jsonl, line 1 is not JSON"),
        (["--tokenizer=absent.json"], "Tokenizer absent.json does not exist"),
        (["--tokenizer={dir}/bad.json"], "bad.json is not a Hugging Face tokenizer.json"),
        (["--eot_token=x"], "eot_token must be left out for the tokenizer 'bytes'"),
        (["--text_field=body"], "line 1: there is no field 'body' (found: text, n)"),
        (["--context=0"], "context must be from 1 to 16777216; got 0"),
        (["--context=16777217"], "context must be from 1 to 16777216; got 16777217"),
        (["--out="], "--out must be a path; got ''"),
        (["--context=many"], "--context must be an integer; got 'many'."),
        (["--validation_fraction=2"], "at most 0.5; got 2.0"),
        (["--workers=-1"], "workers must be 1 or more; got -1"),
        (["--over"], "unknown flag --over; perhaps --overwrite."),
        (["--out={dir}/bad.json/set"], "Not a directory"),
    ],
)
def test_command_line_errors(tmp_path, jsonl, capsys, arguments, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "bad.json").write_text("{}")
    if "bad.jsonl" in arguments[0]:
        (folder / "bad.jsonl").write_text("nonsense\n")
    given = [f"--source={jsonl}", "--tokenizer=bytes", f"--out={tmp_path / 'set'}"]
    with pytest.raises(SystemExit) as stopped:
        command.run(given + [argument.format(dir=folder) for argument in arguments])
    message_printed = str(stopped.value.code) + capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    assert message in message_printed
    assert "Traceback" not in message_printed
    assert not (tmp_path / "set").exists()


def test_the_same_command_continues_after_ctrl_c(tmp_path, jsonl, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    arguments = [f"--source={jsonl}", "--tokenizer=bytes", f"--out={tmp_path / 'set'}"]
    with monkeypatch.context() as patched:
        patched.setattr(shards.ShardWriter, "write", interrupt)
        with pytest.raises(SystemExit, match="interrupted; the same command continues the prep"):
            command.run(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.parts-0-of-1", "source.jsonl"]
    monkeypatch.setattr("flowhn_jax.data.prepare.parts.encode", None)  # nothing is encoded again
    command.run(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source.jsonl"]


def test_a_shard_that_is_none_is_refused(tmp_path, jsonl):
    for shard in ("", "1", "2/2", "-1/2", "0/0", "a/b"):
        with pytest.raises(ValueError, match=f"^shard must be I/N .*; got '{shard}'"):
            prepare(str(jsonl), "bytes", tmp_path / "set", shard=shard)


@pytest.fixture
def small_groups(monkeypatch):
    """Divide the text among a dozen parts."""
    monkeypatch.setattr(encoding, "GROUP_BYTES", 500)


def prepare_shard(jsonl, out, shard, **arguments):
    return prepare(str(jsonl), "bytes", out, context=32, shard=shard, **arguments)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_hosts_prepare_what_one_does(tmp_path, jsonl, small_groups, order):
    prepare(str(jsonl), "bytes", tmp_path / "expected", context=32)
    first, second = (f"{index}/2" for index in order)
    for _ in range(2):  # a second call only finds that it is complete
        with pytest.raises(ShardsMissing, match=f"Shard {first} of .* missing are {second}\\."):
            prepare_shard(jsonl, tmp_path / "set", first)
    made = prepare_shard(jsonl, tmp_path / "set", second)
    assert content(tmp_path / "set") == content(tmp_path / "expected")
    assert prepare_shard(jsonl, tmp_path / "set", first) == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "set", "source.jsonl"]


def test_two_hosts_at_the_same_time(tmp_path, jsonl, small_groups):
    prepare(str(jsonl), "bytes", tmp_path / "expected", context=32)
    command = [sys.executable, "-m", "flowhn_jax.data.prepare", "--tokenizer=bytes", "--context=32"]
    command += [f"--source={jsonl}", f"--out={tmp_path / 'set'}"]
    hosts = [
        subprocess.Popen([*command, f"--shard={i}/2"], stdout=subprocess.PIPE, text=True,
                         env=ENVIRONMENT)
        for i in range(2)
    ]  # fmt: skip
    printed = [host.communicate(timeout=60)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0]
    assert sum("windows" in each for each in printed) >= 1
    assert all("windows" in each or "The set is made when all are" in each for each in printed)
    assert content(tmp_path / "set") == content(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "set", "source.jsonl"]


def test_hosts_with_other_options_or_sources_are_refused(tmp_path, jsonl, small_groups):
    with pytest.raises(ShardsMissing):
        prepare_shard(jsonl, tmp_path / "set", "0/2")
    with pytest.raises(
        ValueError, match=r"parts-0-of-2 differs in validation_fraction\. Remove it"
    ):
        prepare_shard(jsonl, tmp_path / "set", "1/2", validation_fraction=0.2)
    with jsonl.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"parts-0-of-2 differs in source\. Remove it"):
        prepare_shard(jsonl, tmp_path / "set", "1/2")
    assert not (tmp_path / "set").exists()


def test_a_terminal_shows_a_bar_with_the_rate(tmp_path, jsonl, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(throughput, "_SECONDS_BETWEEN_RATES", 0)
    prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
    assert "preparing" in sys.stderr.getvalue()
    assert " MB/s" in sys.stderr.getvalue()


def test_prepare_imports_neither_jax_nor_grain():
    code = "import sys, flowhn_jax.data.prepare; assert not {'jax', 'grain'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


def test_a_path_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("one text " * 50)
    out = tmp_path / "\udcff"
    with pytest.raises(ValueError, match="The path of prepared data must be UTF-8"):
        prepare(str(tmp_path / "text.txt"), "bytes", out, context=8)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    prepare(str(tmp_path / "text.txt"), "bytes", tmp_path / "set", context=8)
    (tmp_path / "set").rename(out)
    with pytest.raises(ValueError, match="The path of prepared data must be UTF-8"):
        PreparedSet.open(out)
