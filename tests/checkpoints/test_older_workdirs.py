"""Workdirs and data that earlier code made: they open, restore bit for bit, and train on.

Each model has a workdir that was stopped after step 3 of 6, and its parameters after steps 3 and 6.
Commit 560caf0 made them, on Python 3.11 with jax 0.10.2.
"""

import dataclasses
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from flowhn_jax.checkpoints import workdir
from flowhn_jax.checkpoints.parameters import load_params
from flowhn_jax.config import KINDS
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training import metrics
from flowhn_jax.training.trainer import fit
from tests.slow import all_but

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "workdirs"


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workdirs")
    with tarfile.open(GOLDEN / "workdirs.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def params_of(folder, config):
    mesh = make_mesh(config.mesh, 0)
    params = jax.device_get(load_params(str(folder), config.model, mesh))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(value)
        for path, value in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.mark.parametrize("kind", all_but(["flowhn", "llama", "mamba2"], KINDS))
def test_a_workdir_of_earlier_code_is_restored_and_continued(workdirs, kind):
    folder = workdirs / kind
    golden = np.load(GOLDEN / "params.npz")
    expected = {
        step: {
            name.removeprefix(f"{kind}/{step}/"): golden[name]
            for name in golden.files
            if name.startswith(f"{kind}/{step}/")
        }
        for step in (3, 6)
    }
    config = workdir.read_config(str(folder))
    data = dataclasses.replace(config.data, path=str(workdirs / "data"))
    config = dataclasses.replace(config, data=data)

    restored = params_of(folder, config)
    assert restored.keys() == expected[3].keys()
    for name, value in restored.items():
        np.testing.assert_array_equal(value, expected[3][name], err_msg=name)

    assert fit(config, str(folder))
    assert [row["step"] for row in metrics.read_rows(folder)] == [1, 2, 3, 4, 5, 6]
    for name, value in params_of(folder, config).items():
        np.testing.assert_allclose(value, expected[6][name], rtol=0, atol=2e-4, err_msg=name)
