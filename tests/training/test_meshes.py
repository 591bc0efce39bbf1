"""A run continues on any mesh."""

import dataclasses
import signal

import jax
import numpy as np

from flowhn_jax.config import MeshConfig
from flowhn_jax.training import metrics as metrics_lib
from flowhn_jax.training import trainer
from flowhn_jax.training.trainer import fit
from tests.training.test_trainer import (
    data,  # noqa: F401
    final_params,
    run_config,
    signalling_console,
    uninterrupted,  # noqa: F401
)

MESHES = [MeshConfig(data=1, fsdp=4, tensor=2), MeshConfig(data=2, branch=2)]


def test_each_part_of_a_run_on_another_mesh(data, uninterrupted, tmp_path, monkeypatch):  # noqa: F811
    config = run_config(data)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Console", signalling_console(signal.SIGTERM))
        for mesh in MESHES:
            fit(dataclasses.replace(config, mesh=mesh), str(tmp_path))
    fit(config, str(tmp_path))
    rows = [metrics_lib.read_rows(str(workdir)) for workdir in (tmp_path, uninterrupted[0])]
    found, expected = ([(row["step"], row["loss"]) for row in each] for each in rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    params = final_params(tmp_path, config), uninterrupted[1]
    for a, b in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3 * np.abs(b).max())
