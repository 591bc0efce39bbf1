import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from flowhn_jax.checkpoints.workdir import locked
from flowhn_jax.training.trainer import fit
from tests.training.test_trainer import data, run_config  # noqa: F401

_HOLDER = """
import sys, time
from flowhn_jax.checkpoints.workdir import locked
with locked(sys.argv[1]):
    print("has it", flush=True)
    time.sleep(600)
"""


def test_the_second_trainer_is_refused_until_the_first_has_died(data, tmp_path):  # noqa: F811
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "has it\n"
    config = run_config(data, steps=1)
    message = f"is in use by process {holder.pid} on host {socket.gethostname()};"
    with pytest.raises(ValueError, match=message):
        fit(config, str(tmp_path))
    assert os.listdir(tmp_path) == ["lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    # The file of the dead process is still there, and means nothing.
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid
    fit(config, str(tmp_path))
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_it_is_given_back(tmp_path):
    for _ in range(2):
        with locked(str(tmp_path)):
            pass


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[]", b"{}"])
def test_a_holder_that_says_nothing_useful(tmp_path, content):
    with locked(str(tmp_path)):
        (tmp_path / "lock").write_bytes(content)
        with pytest.raises(ValueError, match="in use by another process"), locked(str(tmp_path)):
            pass


def test_removing_the_file_lets_nobody_in(tmp_path):
    with locked(str(tmp_path)):
        (tmp_path / "lock").unlink()
        with pytest.raises(ValueError, match="in use by another process"), locked(str(tmp_path)):
            pass


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(target)
    with locked(str(tmp_path / "run")):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    assert target.read_text() == "mine"
