"""Files of the Hugging Face hub, served by a small server with the hub's interface."""

import gzip
import http.server
import json
import pathlib
import threading
import urllib.parse

import jax
import numpy as np
import pytest

from flowhn_jax import models, storage
from flowhn_jax.data.sources import open_source
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.interop import huggingface
from flowhn_jax.interop.transfer import export_run, import_run
from flowhn_jax.storage import hub as hub_lib
from flowhn_jax.storage import place, readable_place
from tests.small import small_baseline

TOKENIZER = pathlib.Path(__file__).parent.parent / "data" / "tokenizer.json"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `server.repositories`: {'datasets/me/texts': {'a/b.txt': b'...'}}."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        if self.server.status:
            self.answer(self.server.status, b"{}")
            return
        for name, files in self.server.repositories.items():
            if path.startswith(f"api/{name}/tree/main"):
                below = path.removeprefix(f"api/{name}/tree/main").strip("/")
                self.tree(files, below, "recursive=true" in self.path.lower())
                return
            if path.startswith(f"{name.removeprefix('models/')}/resolve/main/"):
                self.file(files, path.partition("/resolve/main/")[2])
                return
            if path in (f"api/{name}", f"api/{name}/revision/main"):
                repository = name.partition("/")[2]
                self.answer(200, json.dumps({"id": repository, "sha": "0" * 40}).encode())
                return
        self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def tree(self, files, below, is_recursive):
        prefix = f"{below}/" if below else ""
        found = {}
        for name, content in files.items():
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                if is_recursive or depth == 1:
                    folder = prefix + "/".join(parts[:depth])
                    found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0"}
            if is_recursive or len(parts) == 1:
                oid = f"{hash(content) & 0xFFFF:x}"
                found[name] = {"type": "file", "path": name, "size": len(content), "oid": oid}
        if below and not found:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(200, json.dumps(list(found.values())).encode())

    def file(self, files, name):
        if name not in files:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        content, code = files[name], 200
        if given := self.headers.get("Range"):
            first, last = given.removeprefix("bytes=").split("-")
            content, code = content[int(first) : int(last) + 1 if last else None], 206
        self.answer(code, content, {"ETag": '"x"', "X-Repo-Commit": "0" * 40})

    def answer(self, code, body, headers=None):
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """Run the server for `storage.hub`; return it, without repositories."""
    from huggingface_hub import HfFileSystem

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.status = {}, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = HfFileSystem(
        endpoint=f"http://127.0.0.1:{server.server_port}", token=False, skip_instance_cache=True
    )
    monkeypatch.setattr(hub_lib, "_hub", lambda: files)
    yield server
    server.shutdown()
    server.server_close()


def test_a_dataset_is_read_as_local_files_are(hub, tmp_path, paragraphs_of_text):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in paragraphs_of_text).encode()
    files = {
        "README.md": b"no source",
        "data/a.jsonl.gz": gzip.compress(lines),
        "data/sub/b.txt": "\n".join(paragraphs_of_text).encode() * 3,
        ".gitattributes": b"",
    }
    hub.repositories["datasets/me/texts"] = files
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    def texts(path):
        source = open_source(path)
        found = [b"".join(document.chunks()) for document in source.read(lambda count: None)]
        source.check_unchanged()
        return found

    assert texts("hf://datasets/me/texts") == texts(str(tmp_path))
    for name in ("data", "data/a.jsonl.gz", "data/sub/b.txt"):
        assert texts(f"hf://datasets/me/texts/{name}") == texts(str(tmp_path / name))
    source = open_source("hf://datasets/me/texts")
    files["data/sub/b.txt"] += b"more"
    with pytest.raises(ValueError, match=r"hf://datasets/me/texts/data/sub/b\.txt must not"):
        source.check_unchanged()


@pytest.fixture
def paragraphs_of_text():
    """Return some paragraphs of real text."""
    return (TOKENIZER.parent / "wikitext.txt").read_text().split("\n")[:40]


def test_a_model_and_its_tokenizer(hub, tmp_path):
    config = small_baseline("llama", vocab_size=512)
    params = models.init(config, jax.random.key(0))
    huggingface.save(tmp_path, config, params)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    files["tokenizer.json"] = TOKENIZER.read_bytes()
    files["tokenizer_config.json"] = b'{"add_bos_token": true, "bos_token": "<|endoftext|>"}'
    hub.repositories["models/me/model"] = files
    found = huggingface.load("hf://me/model")[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
    tokenizer = load_tokenizer("hf://me/model/tokenizer.json")
    local = load_tokenizer(str(TOKENIZER))
    assert tokenizer.fingerprint == local.fingerprint
    assert tokenizer.bos_token == "<|endoftext|>"
    line = import_run("hf://me/model", str(tmp_path / "run"))
    assert line.endswith("with its tokenizer")
    export_run(str(tmp_path / "run"), str(tmp_path / "exported"))
    exported = (tmp_path / "exported" / "model.safetensors").read_bytes()
    assert exported == files["model.safetensors"]


def test_a_folder_has_what_is_in_it_and_an_absent_one_nothing(hub, tmp_path):
    hub.repositories["models/me/model"] = {"a.txt": b"a", "b/c.txt": b"c", "b/d/e.txt": b"e"}
    for name, content in hub.repositories["models/me/model"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for folder in ("", "b", "b/d", "absent"):
        ours, theirs = place(tmp_path / folder), readable_place(f"hf://me/model/{folder}")
        assert [each.name for each in theirs.children()] == [each.name for each in ours.children()]
        found, expected = ([(name, file.read()) for name, file in each.walk()]
                           for each in (theirs, ours))  # fmt: skip
        assert found == expected
    assert readable_place("hf://me/absent").children() == []
    assert readable_place("hf://me/model/a.txt").children() == []


def test_what_is_absent_or_refused_is_one_message(hub):
    hub.repositories["datasets/me/texts"] = {"notes.md": b"x"}
    with pytest.raises(FileNotFoundError, match=r"^Source hf://datasets/me/none does not exist\.$"):
        open_source("hf://datasets/me/none")
    with pytest.raises(FileNotFoundError, match="Source hf://datasets/me/texts/no does not exist"):
        open_source("hf://datasets/me/texts/no")
    with pytest.raises(ValueError, match="hf://datasets/me/texts must hold a file of the kinds"):
        open_source("hf://datasets/me/texts")
    with pytest.raises(storage.StorageError, match=r"^reading hf://someone failed: "):
        open_source("hf://someone")
    hub.status = 403
    with pytest.raises(
        storage.StorageError, match=r"^reading hf://datasets/me/other failed: .*403"
    ):
        open_source("hf://datasets/me/other")
    for text in ("hf://", "hf://me/../x"):
        with pytest.raises(ValueError, match=r"must be hf://NAME/FILE"):
            storage.readable_place(text)


def test_the_hub_is_not_written():
    place = storage.readable_place("hf://me/model")
    for use in (
        lambda: place.write_whole(b"x"),
        lambda: place.copy_from(TOKENIZER),
        place.writing,
        place.remove,
        place.remove_tree,
        place.make_folder,
        place.kvstore,
    ):
        with pytest.raises(ValueError, match="the Hugging Face hub is only read; got 'hf://me/mod"):
            use()
    with pytest.raises(ValueError, match="a local path is needed here; got 'hf://me/model'"):
        place.local()
