"""Two processes of four devices each, whose workdir and data are in one bucket."""

import pathlib

import pytest

from flowhn_jax import config as config_lib
from flowhn_jax.checkpoints import files, manifest
from flowhn_jax.data.prepare import prepare
from tests.training.test_processes import config_on, fit_in_two_processes
from tests.training.test_trainer import data  # noqa: F401
from tools.same_run import differences

TEXT = pathlib.Path(__file__).parent.parent / "data" / "wikitext.txt"


@pytest.mark.slow
def test_two_processes_on_one_bucket(data, bucket, tmp_path):  # noqa: F811
    local, workdir = tmp_path / "local", f"{bucket}/run"
    fit_in_two_processes(config_on(data, data=8), local)
    prepare(str(TEXT), "bytes", f"{bucket}/set", context=24)
    config = config_lib.to_dict(config_on(f"{bucket}/set", data=8))
    config["data"]["cache"] = str(tmp_path / "cache")
    config = config_lib.parse(config)
    printed = fit_in_two_processes(config, workdir)
    assert "parameters" in "".join(printed[0])
    assert printed[1] == []
    newest = files.directory(workdir) / "8"
    assert manifest.damage(newest) is None
    (newest / files.COMMITTED).remove()  # as if the last save had been killed
    printed = fit_in_two_processes(config, workdir)
    assert f"resuming {workdir} at step 6" in printed[0]
    assert manifest.damage(newest) is None
    found = differences(workdir, str(local))
    assert {name: n for name, n in found.items() if n} == {"rows_compared": 4}
