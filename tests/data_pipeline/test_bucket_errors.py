"""Answers of a store that refuses or fails, where data are read and written."""

import contextlib
import http.server
import threading
import types
import urllib.error
import urllib.request

import numpy as np
import pytest

from flowhn_jax.commands import prepare as command
from flowhn_jax.data.prepare import prepare
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.sources import open_source
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation.prompt_files import read_prompts
from flowhn_jax.evaluation.task_files import find_file
from flowhn_jax.interop import huggingface
from flowhn_jax.storage import StorageError, requests
from tests.storage.emulator import used


@contextlib.contextmanager
def serving(answer):
    """Run a server that answers each request by `answer(handler)`; yield its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler, code, body, headers=()):
    handler.send_response(code)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def clock(monkeypatch):
    """Let pauses pass at once; return the list with the time."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(requests, "sleep", sleep)
    monkeypatch.setattr(requests, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


USES = {
    "source": open_source,
    "tokenizer": load_tokenizer,
    "set": PreparedSet.open,
    "out": lambda url: prepare("embedded", "bytes", url),
    "model": huggingface.load,
    "prompts": read_prompts,
    "tasks": lambda url: find_file("piqa", url),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("code", "seconds"), [(403, 20), (429, 120), (503, 120), (400, 0)])
def test_an_answer_that_stays_is_one_message(
    use, code, seconds, clock, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path))
    body = b'{"error": {"message": "no such luck"}}'
    message = rf"gs://bucket/x\S* failed: {code} .*no such luck"
    with (
        serving(lambda handler: send(handler, code, body)) as url,
        used(url),
        pytest.raises(StorageError, match=message),
    ):
        USES[use]("gs://bucket/x")
    assert seconds / 2 <= clock[0] <= seconds * 1.25
    reports = [line for line in capsys.readouterr().err.splitlines() if "trying again" in line]
    assert len(reports) == (seconds > 0)


@pytest.mark.parametrize("use", USES)
def test_an_absent_bucket_is_one_message(use, emulator, clock, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path))
    with used(emulator), pytest.raises(OSError, match="gs://absent/x") as raised:
        USES[use]("gs://absent/x")
    assert "\n" not in str(raised.value)
    assert clock[0] == 0


def test_a_command_prints_one_message(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path))
    flags = ["--source=gs://bucket/x", "--tokenizer=bytes", "--out=gs://bucket/y"]
    message = r"^error: [^\n]*gs://bucket/x\S* failed: 403[^\n]*$"
    with (
        serving(lambda handler: send(handler, 403, b"{}")) as url,
        used(url),
        pytest.raises(SystemExit, match=message),
    ):
        command.run(flags)


def test_answers_that_pass_lose_nothing(bucket, emulator, jsonl, tmp_path, clock, rng, monkeypatch):
    """A fifth of all requests fails; set and windows are those of a store that never does."""
    from read_back import content, windows

    failed = []

    def forward(handler):
        if rng.random() < 0.2:
            failed.append(handler.path)
            send(handler, int(rng.choice([429, 500, 502, 503])), b"{}")
            return
        skipped = ("host", "content-length", "connection", "accept-encoding")
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in skipped}
        request = urllib.request.Request(
            emulator + handler.path, handler.body or None, headers, method=handler.command
        )
        try:
            with urllib.request.urlopen(request) as answer:
                code, body, found = answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            code, body, found = error.code, error.read(), error.headers
        kept = [
            (k, v) for k, v in found.items() if k.lower().startswith(("x-goog", "content-type"))
        ]
        send(handler, code, body, kept)

    local = prepare(str(jsonl), "bytes", tmp_path / "local", context=32)
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path / "cache"))
    with serving(forward) as url, used(url):
        made = prepare(str(jsonl), "bytes", f"{bucket}/set", context=32)
        found = windows(made, "train")
        objects = {name: file.read() for name, file in made.folder.walk()}
    assert len(failed) > 3
    assert objects == content(local.folder.local())
    for ours, theirs in zip(found, windows(local, "train"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
