import json
import logging
import os
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import device_cache, tuning

KIND = "NVIDIA H100 80GB HBM3"
DEFAULT, CANDIDATES = (1, 1), [(1, 1), (2, 4), (8, 8)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLOWHN_SCAN_TILE", raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})


@pytest.fixture
def on_gpu(monkeypatch):
    """Pretend that the CPU is a GPU; return the tiles that were timed, (2, 4) being fastest."""
    timed = []
    time = tuning._time

    def timing(function, arguments):
        assert time(function, arguments) > 0
        timed.append(function.tile)
        return abs(function.tile[0] - 2)

    device = SimpleNamespace(platform="gpu", device_kind=KIND)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(tuning, "_time", timing)
    return timed


def program(tile):
    def function(x):
        assert tile != (8, 8), "too large"
        return x @ x

    function.tile = tile
    return function


def choose(key="f32"):
    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    return tuning.choose_tile("scan", key, CANDIDATES, DEFAULT, program, [shape])


def test_the_fastest_is_saved_for_all_processes(on_gpu, monkeypatch):
    assert choose() == (2, 4)
    assert on_gpu == [(1, 1), (2, 4)]  # (8, 8) does not compile
    assert choose() == (2, 4)
    monkeypatch.setattr(tuning, "_chosen", {})  # another process
    assert choose() == (2, 4)
    assert len(on_gpu) == 2
    assert choose("bf16") == (2, 4)
    assert len(on_gpu) == 4


def test_while_an_outer_function_is_traced(on_gpu):
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    def traced(x):
        return jax.lax.scan(lambda x, _: (x * choose()[1], None), x, length=2)[0]

    np.testing.assert_array_equal(traced(jnp.ones(2)), [16.0, 16.0])
    assert on_gpu == [(1, 1), (2, 4)]


def test_default_if_nothing_can_be_measured(on_gpu, monkeypatch):
    monkeypatch.setattr(tuning, "_time", lambda *_: 1 / 0)
    assert choose() == DEFAULT
    assert device_cache.read(KIND, "tile", "scan f32") is None  # another process tries again
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    device_cache.write(KIND, "tile", "scan f32", [8, 8])
    assert choose() == DEFAULT


def test_default_on_other_platforms():
    assert choose() == DEFAULT


def test_environment(monkeypatch):
    monkeypatch.setenv("FLOWHN_SCAN_TILE", "16, 32")
    assert choose() == (16, 32)
    for text in ("", "16", "16,32,1", "16,x", "16,0"):
        monkeypatch.setenv("FLOWHN_SCAN_TILE", text)
        with pytest.raises(ValueError, match=r"FLOWHN_SCAN_TILE must be 2 positive integers"):
            choose()


def test_cache_holds_sections_and_keys(tmp_path):
    assert device_cache.read(KIND, "tile", "a") is None
    device_cache.write(KIND, "tile", "a", [1, 2])
    device_cache.write(KIND, "tile", "b", [3])
    device_cache.write(KIND, "split", "a", {"seconds": 0.5})
    device_cache.write("TPU v5e", "tile", "a", 7)
    assert device_cache.read(KIND, "tile", "a") == [1, 2]
    assert device_cache.read(KIND, "tile", "b") == [3]
    assert device_cache.read(KIND, "split", "a") == {"seconds": 0.5}
    assert device_cache.read("TPU v5e", "tile", "a") == 7
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["NVIDIA_H100_80GB_HBM3.json", "TPU_v5e.json"]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FLOWHN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device_cache.write("x", "tile", "a", 1)
    assert json.loads((tmp_path / "flowhn_jax" / "x.json").read_text()) == {"tile": {"a": 1}}
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    device_cache.write("x", "tile", "a", 1)
    assert (tmp_path / "home" / ".cache" / "flowhn_jax" / "x.json").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '{"tile": 3}', "\x00"])
def test_a_damaged_file_counts_as_empty(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert device_cache.read("x", "tile", "a") is None
    device_cache.write("x", "tile", "a", 1)
    assert device_cache.read("x", "tile", "a") == 1


def test_an_unwritable_folder_is_a_warning(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWHN_CACHE_DIR", os.fspath(tmp_path / "file" / "folder"))
    with caplog.at_level(logging.WARNING):
        device_cache.write("x", "tile", "a", 1)
    assert "not saved" in caplog.text


def test_a_user_without_a_home_has_no_cache(monkeypatch, caplog):
    for name in ("FLOWHN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home"))
    )
    with caplog.at_level(logging.WARNING):
        device_cache.write("x", "tile", "a", 1)
    assert device_cache.read("x", "tile", "a") is None
    assert "not saved: no home" in caplog.text
