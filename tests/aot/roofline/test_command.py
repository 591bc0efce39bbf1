"""`flowhn aot --roofline`: a small train step from flags to tables, file and picture."""

import json

import pytest

from flowhn_jax.aot.roofline.categories import CATEGORIES, HEAD, PRODUCTS
from flowhn_jax.commands import aot
from tests.aot import cuda_target, tpu_target

pytestmark = pytest.mark.aot

_SMALL = ["context=128", "width=128", "mlp_width=256", "blocks=1", "vocab_size=512", "heads=8"]
_SMALL += ["kv_heads=2", "dtype=bfloat16"]


def run(*flags, topology):
    model = [f"--config.model.{key}" for key in _SMALL]
    batch = ["--config.train.batch_size=16", "--config.mesh.data=1", "--config.mesh.fsdp=-1"]
    config = ["--config=configs/flowhn_tiny.py:fac_split", f"--topology={topology}"]
    aot.run([*config, *model, *batch, "--roofline", *flags])


def test_of_tpus(tmp_path, capsys):
    tpu_target.devices("v5e:2x2")
    first, second, picture = (str(tmp_path / name) for name in ("a.json", "b.json", "c.svg"))
    run(f"--out={first}", topology="v5e:2x2")
    printed = capsys.readouterr().out
    assert "fac_split on v5e:2x2, mesh fsdp=4; 16 sequences of 128 tokens per step" in printed
    assert "kernels by their static schedules" in printed
    with open(first) as file:
        before = json.load(file)
    parts = before["bound"]["parts"]
    assert list(parts) == list(CATEGORIES)
    assert sum(part["milliseconds"] for part in parts.values()) == pytest.approx(
        before["bound"]["milliseconds"]
    )
    assert all(parts[name]["milliseconds"] > 0 for name in CATEGORIES)
    assert parts[PRODUCTS]["flops_milliseconds"] + parts[HEAD]["flops_milliseconds"] > 0
    assert len(before["bound"]["heaviest"]) == 10
    assert 0 < before["bound"]["mfu_bound"] < 1
    assert before["bound"]["gigabytes"] > 0
    assert before["ideal_gigabytes"] > 0

    option = "xla_tpu_scoped_vmem_limit_kib=8192"
    run(f"--xla={option}", f"--diff={first}", f"--out={second}", f"--plot={picture}",
        topology="v5e:2x2")  # fmt: skip
    printed = capsys.readouterr().out
    assert f"after: fac_split on v5e:2x2, 16 x 128, {option}" in printed
    assert "| MFU bound, %" in printed
    with open(second) as file:
        assert json.load(file)["options"] == dict([option.split("=")])
    with open(picture) as file:
        assert "<svg" in file.read()


@pytest.mark.slow
def test_of_gpus(capsys):
    pytest.importorskip("jax_triton", reason="compiles by jax-triton")
    cuda_target.needs_cudnn()
    cuda_target.h100_mesh(data=1)
    run("--json", topology="gpu:h100x1")
    found = json.loads(capsys.readouterr().out)
    assert not found["bound"]["kernels_by_schedule"]
    assert found["bound"]["parts"]["attention"]["flops_milliseconds"] > 0
    assert found["bound"]["parts"]["scan"]["milliseconds"] > 0
    assert 0 < found["memory"] < found["memory_limit"]
