import contextlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.training import start, trainer, validation
from flowhn_jax.training.health import preemption
from flowhn_jax.training.health.preemption import StopRequest
from tests.training.test_trainer import (  # noqa: F401
    assert_is_the_uninterrupted_run,
    data,
    run_config,
    uninterrupted,
)


class Killed(BaseException):
    """In place of a SIGKILL, which would end the tests."""


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def kill():
    raise Killed


def interrupting(function, call, interrupt=terminate):
    """Return the function, interrupted before one of its calls."""
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            interrupt()
        return function(*args, **kwargs)

    return interrupted


@pytest.mark.parametrize(
    ("moment", "place", "call", "steps"),
    [
        ("compiling", (trainer, "compile_unless"), 1, [0]),
        ("validating", (validation, "validate"), 1, [3, 4]),
        ("saving", (Checkpoints, "save"), 1, [3, 4]),
        ("the last validation", (validation, "validate"), 2, [6, 8]),
    ],
)
def test_a_signal_at_any_moment(
    data,  # noqa: F811
    uninterrupted,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
    moment,
    place,
    call,
    steps,
):
    config = run_config(data)
    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupting(getattr(*place), call))
        done = trainer.fit(config, str(tmp_path))
    assert not done
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == steps
    assert f"stopped by SIGTERM at step {steps[-1]}" in capsys.readouterr().out
    # The next start writes the missing row, and is killed before its next checkpoint.
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_compile", interrupting(trainer.Trainer._compile, 1, kill))
        with contextlib.suppress(Killed):
            trainer.fit(config, str(tmp_path))
    assert trainer.fit(config, str(tmp_path))
    assert_is_the_uninterrupted_run(tmp_path, config, uninterrupted)
    if moment == "the last validation":  # which is not done once more
        capsys.readouterr()
        assert trainer.fit(config, str(tmp_path))
        assert "nothing to train" in capsys.readouterr().out


def test_a_signal_while_the_data_are_prepared(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Preparation ends at once, and leaves nothing incomplete."""

    def never_ending(config, workdir):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(start, "open_data", never_ending)
    assert not trainer.fit(run_config(data), str(tmp_path))
    assert "stopped by SIGTERM before there was anything to save" in capsys.readouterr().out
    assert not any((tmp_path / "checkpoints").iterdir())


def test_train_py_ends_with_status_0_after_a_signal_during_the_imports(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/flowhn_tiny.py"]
    process = subprocess.Popen(
        [*command, f"--workdir={tmp_path}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    # Our handler is installed before anything slow.
    deadline = time.monotonic() + 30
    while not catches(process.pid, signal.SIGTERM) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert b"stopped by SIGTERM before there was anything to save" in out


def catches(pid, number):
    with open(f"/proc/{pid}/status") as status:
        masks = dict(line.split(":") for line in status)
    return bool(int(masks["SigCgt"], 16) >> (number - 1) & 1)


def test_the_second_signal_ends_the_process_at_once():
    script = (
        "import os, signal, time\n"
        "from flowhn_jax.training.health.preemption import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.reason, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM
    assert ended.stdout == "SIGTERM\n"
    assert "SIGTERM: stopping; another signal ends the process at once" in ended.stderr


def test_a_notice_and_the_signal_that_follows_it_leave_time_for_a_checkpoint(capfd):
    with StopRequest() as stop:
        stop.request("the host's preempted is TRUE")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "the host's preempted is TRUE"
    assert "the host's preempted is TRUE: stopping\n" in capfd.readouterr().err


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (
            {"/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "/preempted": "FALSE"},
            "the host's maintenance-event is TERMINATE_ON_HOST_MAINTENANCE",
        ),
        (
            {"/maintenance-event": "NONE", "/preempted": "TRUE"},
            "the host's preempted is TRUE",
        ),
        ({"/maintenance-event": "NONE", "/preempted": "FALSE"}, None),
        ({}, None),
    ],
)
def test_notices_of_the_host(monkeypatch, answers, reason):
    """A server answers as Google's metadata server; without a notice nothing is requested."""
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            known = self.path in answers and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answers.get(self.path, "").encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(preemption, "_SECONDS_BETWEEN_POLLS", 0.05)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stop = StopRequest()
        with stop.watching_notices(f"http://127.0.0.1:{server.server_port}/"):
            deadline = time.monotonic() + 20
            while len(paths) < 6 and not stop.is_requested() and time.monotonic() < deadline:
                time.sleep(0.02)
        server.shutdown()
    assert paths
    assert stop.reason == reason
