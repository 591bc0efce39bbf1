"""Two processes of four devices each, joined by gloo, are one process of eight, or one device."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from flowhn_jax import config as config_lib
from flowhn_jax.evaluation import run as eval_run
from flowhn_jax.parallel import distributed
from flowhn_jax.training import metrics as metrics_lib
from flowhn_jax.training.loop import fit
from tests.training.test_loop import data, final_params, run_config  # noqa: F401

_MAIN = """
import json, sys
from flowhn_jax import config as config_lib
from flowhn_jax.evaluation import run
from flowhn_jax.parallel import distributed
from flowhn_jax.training.loop import fit
text, workdir, address, process = sys.argv[1:]
distributed.initialize(address, 2, int(process))
config = config_lib.parse(json.loads(text))
fit(config, workdir)
run.evaluate(config, workdir, "perplexity")
"""


def fit_in_two_processes(config, workdir):
    """The lines that each process printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    text = json.dumps(config_lib.to_dict(config))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _MAIN, text, str(workdir), address, str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    return [
        [line for line in out.splitlines() if line and "peer ranks" not in line]  # gloo's
        for out, _ in results
    ]


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
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a:1", 2, None), "go together; found 'a:1', 2 and None"),
        (("a:1", 2, 2), "--process_id is 2; accepted is 0 to 1"),
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
