"""Two processes of four devices each, joined by gloo, are one process of eight, or one device."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from flowhn_jax import config as config_lib
from flowhn_jax.checkpoints.workdir import locked
from flowhn_jax.config import MeshConfig
from flowhn_jax.evaluation import evaluate as eval_run
from flowhn_jax.parallel import distributed
from flowhn_jax.training import metrics as metrics_lib
from flowhn_jax.training.trainer import fit
from tests.training.test_trainer import data, final_params, run_config  # noqa: F401

# What gloo's threads print to the output of the process, at once and in each other's lines, goes to
# its errors: only what Python prints is left.
_PYTHON_OUTPUT = """
import os, sys
sys.stdout = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
"""

_MAIN = f"""{_PYTHON_OUTPUT}
import json
from flowhn_jax import config as config_lib
from flowhn_jax.evaluation import evaluate
from flowhn_jax.parallel import distributed
from flowhn_jax.training.trainer import fit
text, workdir, address, process = sys.argv[1:]
distributed.initialize(address, 2, int(process))
config = config_lib.parse(json.loads(text))
fit(config, workdir)
evaluate.evaluate(config, workdir, "perplexity")
"""


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(command, **pipes):
    """Start a process that has four devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    return subprocess.Popen([sys.executable, *command], env=environment, text=True, **pipes)


def fit_in_two_processes(config, workdir):
    """Return the lines that each process printed."""
    address, text = free_address(), json.dumps(config_lib.to_dict(config))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        start(["-c", _MAIN, text, str(workdir), address, str(process)], **pipes)
        for process in range(2)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    return [out.splitlines() for out, _ in results]


def config_on(folder, **axes):
    """Positions and heads divide over eight devices."""
    config = config_lib.to_dict(run_config(folder))
    config["model"] |= {"heads": 8, "split": config["model"]["split"] | {"align": 8}}
    return config_lib.parse(config | {"mesh": {"data": 1} | axes})


def losses(workdir):
    names = ("loss", "validation_loss")
    return [[row[name] for name in names if name in row] for row in metrics_lib.read_rows(workdir)]


@pytest.mark.parametrize(
    "axes",
    [
        dict(data=2, fsdp=2, branch=2),
        pytest.param(dict(data=8), marks=pytest.mark.slow),
        # The processes hold the same sequences, and halves of the parameters.
        pytest.param(dict(fsdp=1, tensor=4, branch=2), marks=pytest.mark.slow),
        # States and the inputs of convolutions go from one process to the other.
        pytest.param(dict(sequence=8), marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one(data, tmp_path, axes, capsys):  # noqa: F811
    two, one, single = (str(tmp_path / name) for name in ("two", "one", "single"))
    printed = fit_in_two_processes(config_on(data, **axes), two)
    assert "parameters" in "".join(printed[0])
    assert printed[1] == []
    fit(config_on(data, **axes), one)
    fit(config_on(data), single)
    capsys.readouterr()
    eval_run.evaluate(config_on(data), single, "perplexity")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(printed[0][-1])["nll"] == pytest.approx(result["nll"], rel=1e-5)
    for workdir in (one, single):
        for found, expected in zip(losses(two), losses(workdir), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5)
    # A checkpoint of two processes restores in one, on any mesh.
    params = [final_params(run, config_on(data, fsdp=4, tensor=2)) for run in (two, single)]
    for a, b in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3 * np.abs(b).max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a:1", 2, None), "must be given together; got 'a:1', 2 and None"),
        (("a:1", 2, 2), "--process_id must be 0 to 1, below --num_processes; got 2"),
    ],
)
def test_flags_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*arguments)


def test_one_process_joins_none(monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    distributed.initialize(None, None, None)
    assert jax.process_count() == 1
    assert distributed.is_first()
    assert distributed.any_process(True)


_RECIPE = """
import json
from flowhn_jax import config as config_lib

def get_config():
    config = config_lib.default()
    config.update(json.loads({text!r}))
    return config
"""


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_the_death_of_one_ends_the_other(data, tmp_path):  # noqa: F811
    """By train.py itself: a stop agreed at one step, and no process left waiting for a dead one."""
    config = run_config(data, steps=100_000, log_every=10, eval_every=1000, checkpoint_every=1000)
    config = dataclasses.replace(config, mesh=MeshConfig(data=8))
    text = json.dumps(config_lib.to_dict(config))
    (tmp_path / "recipe.py").write_text(_RECIPE.format(text=text))
    workdir = tmp_path / "run"

    def run_until(row, process, number):
        """Return statuses and outputs of both processes; one gets a signal after `row` rows."""
        address = free_address()
        outputs = [(tmp_path / f"output{index}").open("w+") for index in range(2)]
        processes = [
            start(
                [
                    "train.py",
                    f"--config={tmp_path / 'recipe.py'}",
                    f"--workdir={workdir}",
                    f"--coordinator_address={address}",
                    "--num_processes=2",
                    f"--process_id={index}",
                ],
                stdout=output,
                stderr=output,
            )
            for index, output in enumerate(outputs)
        ]
        try:
            deadline = time.monotonic() + 300
            while len(metrics_lib.read_rows(workdir)) < row:
                assert time.monotonic() < deadline, [read(output) for output in outputs]
                assert [each.poll() for each in processes] == [None, None], read(outputs[0])
                time.sleep(0.1)
            processes[process].send_signal(number)
            statuses = [each.wait(60) for each in processes]
        finally:
            for each in processes:
                each.kill()
        return statuses, [read(output) for output in outputs]

    def read(output):
        output.seek(0)
        return output.read()

    statuses, said = run_until(1, 1, signal.SIGTERM)
    assert statuses == [0, 0], said
    (saved,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"stopped by another process at step {saved}" in said[0]

    rows = len(metrics_lib.read_rows(workdir))
    statuses, said = run_until(rows + 2, 1, signal.SIGKILL)
    assert f"resuming {workdir} at step {saved}" in said[0]
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] != 0
    assert "another task died" in said[0] or "heartbeat" in said[0]
    steps = [row["step"] for row in metrics_lib.read_rows(workdir)]
    assert steps == list(range(10, 10 * len(steps) + 1, 10))


def run_two(tmp_path, commands):
    """Return statuses, outputs and seconds of two processes of train.py with these arguments."""
    outputs = [(tmp_path / f"error{index}").open("w+") for index in range(2)]
    address, begun = free_address(), time.monotonic()
    processes = [
        start(
            [
                "train.py",
                f"--config={tmp_path / 'recipe.py'}",
                f"--coordinator_address={address}",
                "--num_processes=2",
                f"--process_id={index}",
                *arguments,
            ],
            stdout=output,
            stderr=output,
        )
        for index, (arguments, output) in enumerate(zip(commands, outputs, strict=True))
    ]
    try:
        statuses = [each.wait(120) for each in processes]
    finally:
        for each in processes:
            each.kill()
    seconds = time.monotonic() - begun
    for output in outputs:
        output.seek(0)
    return statuses, [output.read() for output in outputs], seconds


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_all_with_one_message(data, tmp_path, failing):  # noqa: F811
    """Process 0 finds the workdir in use; process 1 finds no data in the given folder."""
    config = dataclasses.replace(run_config(data), mesh=MeshConfig(data=8))
    text = json.dumps(config_lib.to_dict(config))
    (tmp_path / "recipe.py").write_text(_RECIPE.format(text=text))
    workdir = tmp_path / "run"
    workdir.mkdir()
    commands = [[f"--workdir={workdir}"], [f"--workdir={workdir}"]]
    with contextlib.ExitStack() as stack:
        if failing == 0:
            stack.enter_context(locked(str(workdir)))
            message = f"error: --workdir '{workdir}' is in use by process {os.getpid()}"
        else:
            commands[1].append(f"--config.data.path={tmp_path / 'nowhere'}")
            message = f"--out={tmp_path / 'nowhere'}"
        statuses, said, seconds = run_two(tmp_path, commands)
    assert statuses == [1, 1], said
    assert message in said[failing]
    assert "".join(said).count("error: ") == 1, said
    assert "Traceback" not in "".join(said)
    assert "*** Check failure" not in "".join(said)
    assert seconds < 60  # of which the imports and the joining take most
    assert not (workdir / "checkpoints").exists() or not any((workdir / "checkpoints").iterdir())


_BROADCAST = f"""{_PYTHON_OUTPUT}
from flowhn_jax.parallel import distributed
address, process = sys.argv[1:]
distributed.initialize(address, 2, int(process))
mine = [0.58, 2**60 + 1, "\u00e4", None, True, 0.1 + 0.2, 5e-324]
value = distributed.broadcast_from_first(mine if process == "0" else ["something", "else"])
print("same" if value == mine else value)
"""


def test_what_is_broadcast_arrives_bit_for_bit():
    address = free_address()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [start(["-c", _BROADCAST, address, str(index)], **pipes) for index in range(2)]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert out == "same\n"
