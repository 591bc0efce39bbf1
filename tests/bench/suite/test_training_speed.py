"""Part `training`: the largest batch, and models timed round-robin."""

import dataclasses
import types

import jax
import pytest

from flowhn_jax import config as config_lib
from flowhn_jax import flops, models
from flowhn_jax.aot.roofline.rates import Rates
from flowhn_jax.bench.suite import compilation, figures, page, training_speed
from flowhn_jax.bench.suite.document import Document
from flowhn_jax.bench.suite.parts import PARTS
from tests.aot import tpu_target
from tests.small import small_baseline, small_config

PLENTY = 2**36


def config_of(devices=1, **model):
    """Return a small Llama, which compiles fast."""
    config = small_config("no_split", mesh={"data": devices})
    return dataclasses.replace(config, model=small_baseline("llama", blocks=1, **model))


def rate_for(config, sequences, seconds=0.09):
    """Return the FLOP/s at which n sequences per device take 0.09 of a CPU's 0.1 seconds."""
    return sequences * flops.train_flops(config.model, config.model.context) / seconds


@pytest.fixture(scope="module")
def by_time():
    """Return the largest batch with ample memory: 8 sequences."""
    config = config_of()
    return training_speed.compile_largest(config, PLENTY, rate_for(config, 8))


def test_the_batch_is_limited_by_the_time_of_a_step(by_time):
    assert by_time.limit == "step time"
    assert by_time.config.train.batch_size == 8
    assert by_time.programs.config == by_time.config
    assert by_time.attempts == 1


def test_the_batch_is_limited_by_memory(by_time):
    memory = by_time.programs.memory_bytes - 1
    found = training_speed.compile_largest(config_of(), memory, rate_for(config_of(), 8))
    assert found.limit == "memory"
    assert found.config.train.batch_size in (1, 2, 4)
    assert found.programs.memory_bytes <= memory
    assert found.attempts <= 3


def test_a_step_of_a_cpu_has_no_bound(by_time):
    assert by_time.bound_seconds is None


@pytest.mark.aot
def test_a_step_of_a_tpu_takes_at_least_the_time_of_its_flops():
    config, devices = config_of(dtype="bfloat16"), tpu_target.devices("v5e:1x1")[:1]
    rate = rate_for(config, 64, seconds=0.24)
    found = training_speed.compile_largest(config, PLENTY, rate, devices)
    assert found.config.train.batch_size == 64
    model_flops = 64 * flops.train_flops(config.model, config.model.context)
    assert found.bound_seconds > model_flops / flops.peak_flops(devices[0])
    assert found.bound_seconds < 0.01


def test_a_program_that_cannot_be_read_has_no_bound(by_time, monkeypatch):
    unreadable = dataclasses.replace(
        by_time.programs, train_step=types.SimpleNamespace(as_text=lambda: "HloModule f\n")
    )
    monkeypatch.setattr(training_speed, "of_device", lambda device: Rates(1e12, 1e9))
    assert training_speed._bound_seconds(unreadable) is None


class FakePrograms:
    """Programs of 1000 bytes per sequence and device, plus the parameters and optimizer."""

    def __init__(self, config, mesh):
        self.config, self.mesh, self.train_step = config, mesh, self
        self.temp_size_in_bytes = 1000 * config.train.batch_size // mesh.size
        fixed = 16 * models.param_count(config.model)
        self.memory_bytes = fixed + self.temp_size_in_bytes

    def memory_analysis(self):
        return self


@pytest.fixture
def compiles(monkeypatch):
    """Replace the compiler by a fast one; return the programs that it compiles."""
    compiled = []

    def compile_programs(config, mesh):
        compiled.append(FakePrograms(config, mesh))
        return compiled[-1]

    monkeypatch.setattr(training_speed, "compile_programs", compile_programs)
    return compiled


def fixed_bytes(config):
    return 16 * models.param_count(config.model)


@pytest.mark.parametrize(("room", "batch"), [(999, None), (1000, 1), (3999, 2), (64000, 64)])
def test_batches_of_different_memories(compiles, room, batch):
    config = config_of()
    memory, rate = fixed_bytes(config) + room, rate_for(config, 256)
    if batch is None:
        message = "Not even 1 sequence fits into 0.00 GiB"
        with pytest.raises(training_speed.TooLargeError, match=message) as caught:
            training_speed.compile_largest(config, memory, rate)
        assert caught.value.needed >= memory
        assert "\n" not in str(caught.value)
    else:
        found = training_speed.compile_largest(config, memory, rate)
        assert found.config.train.batch_size == batch
        assert found.limit == "memory"
        assert found.attempts == len(compiles) <= 3


def test_every_device_of_a_mesh_has_its_sequences(compiles):
    config = config_of(devices=4)
    found = training_speed.compile_largest(config, fixed_bytes(config) + 2000, rate_for(config, 8))
    assert found.config.train.batch_size == 8
    assert found.programs.mesh.size == 4
    found = training_speed.compile_largest(config, PLENTY, rate_for(config, 8))
    assert found.config.train.batch_size == 32
    one = dataclasses.replace(config, mesh=config_lib.MeshConfig())
    found = training_speed.compile_largest(one, PLENTY, rate_for(config, 8), jax.devices()[:1])
    assert found.config.train.batch_size == 8
    assert found.programs.mesh.size == 1


def test_a_slow_device_still_has_one_sequence(compiles):
    found = training_speed.compile_largest(config_of(), PLENTY, 1.0)
    assert found.config.train.batch_size == 1


def test_parameters_that_do_not_fit_are_not_compiled(compiles):
    config = config_of()
    with pytest.raises(
        training_speed.TooLargeError, match="gradients and optimizer need"
    ) as caught:
        training_speed.compile_largest(config, fixed_bytes(config) - 1, 1e12)
    assert caught.value.needed == fixed_bytes(config)
    assert compiles == []


def test_a_compiler_that_runs_out_of_memory(monkeypatch):
    """A TPU's compiler gives no sizes for programs that do not fit."""
    tried = []

    def refuse(config, mesh):
        tried.append(config.train.batch_size)
        if tried[-1] > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
        return FakePrograms(config, mesh)

    monkeypatch.setattr(training_speed, "compile_programs", refuse)
    config = config_of()
    found = training_speed.compile_largest(config, PLENTY, rate_for(config, 8))
    assert tried == [8, 4, 2]
    assert found.limit == "memory"
    assert found.config.train.batch_size == 2


def test_other_errors_of_the_compiler_are_raised(monkeypatch):
    def refuse(config, mesh):
        raise RuntimeError("INTERNAL: no lowering")

    monkeypatch.setattr(training_speed, "compile_programs", refuse)
    with pytest.raises(RuntimeError, match="no lowering"):
        training_speed.compile_largest(config_of(), PLENTY, 1e12)


def test_the_rate_of_products_is_that_of_the_machines_row(monkeypatch):
    monkeypatch.setattr(training_speed, "measure_rates", None)
    row = {"key": "rates/float32", "matmul_flops_per_second": 5e9}
    assert training_speed.product_rate({"machine": [{"key": "device"}, row]}) == 5e9


MODELS = ("no_split", "llama", "mamba1")
WIDTHS = dict(zip(MODELS, (24, 28, 32), strict=True))  # MLP widths of the Llamas that replace them


@pytest.fixture
def small_models(monkeypatch):
    """Replace the recipes by three small Llamas; return the models timed, in order."""
    timed, time_training = [], training_speed.time_training

    def recipe(size, model):
        assert size == "tiny"
        return config_of(mlp_width=WIDTHS[model])

    def record(programs, repeats):
        timed.append(name_of(programs))
        return time_training(programs, repeats)

    for module in (training_speed, compilation):
        monkeypatch.setattr(module, "recipe", recipe)
    monkeypatch.setattr(training_speed, "sizes", lambda: ("tiny",))
    monkeypatch.setattr(training_speed, "MODELS", MODELS)
    monkeypatch.setattr(training_speed, "time_training", record)
    monkeypatch.setattr(training_speed, "product_rate", lambda earlier: rate_for(config_of(), 1))
    return timed


def name_of(programs):
    return next(name for name in MODELS if WIDTHS[name] == programs.config.model.mlp_width)


def by_key(rows):
    found = {}
    for row in rows:
        found.setdefault(row["key"], []).append(row)
    return found


def test_models_alternate(small_models, tmp_path):
    assert training_speed.plan() == [f"tiny/{model}" for model in MODELS]
    found = by_key(training_speed.measure(training_speed.plan(), {}))
    rounds = len(found["tiny/llama"]) - 1
    assert rounds >= 2
    assert small_models[:rounds] == rounds * ["no_split"]
    assert small_models[rounds:][:4] == ["llama", "mamba1", "mamba1", "llama"]
    assert len(small_models) == 3 * rounds
    for key, rows in found.items():
        assert [bool(row.get("partial")) for row in rows] == (len(rows) - 1) * [True] + [False]
        first, last = rows[0], rows[-1]
        assert first["batch_size"] == 1
        assert first["compile_seconds"] > 0
        assert "tokens_per_second" not in first
        tokens = last["batch_size"] * last["context"]
        assert last["tokens_per_second"] == pytest.approx(tokens / last["step_seconds"])
        assert last["step_seconds_min"] <= last["step_seconds"] <= last["step_seconds_max"]
        assert last["steps"] == 2 * rounds
        assert last["memory_bytes"] > 4 * last["parameters"]
        assert f"tiny/{last['model']}" == key
    # The page and the figure accept these rows unchanged.
    document = Document(tmp_path)
    document.part("training")["rows"] = [rows[-1] for rows in found.values()]
    text = page.render(document, PARTS, ())
    assert all(f"| tiny {model} " in text for model in MODELS)
    pytest.importorskip("matplotlib")
    assert list(figures.draw(document.rows())) == ["training.png"]


def test_a_model_that_does_not_compile_costs_one_row(small_models, monkeypatch):
    compile_programs = training_speed.compile_programs

    def refuse(config, mesh):
        if config.model.mlp_width == WIDTHS["no_split"]:
            raise RuntimeError("INTERNAL: no lowering\nat great length")
        return compile_programs(config, mesh)

    monkeypatch.setattr(training_speed, "compile_programs", refuse)
    found = by_key(training_speed.measure(["tiny/no_split", "tiny/llama"], {}))
    (row,) = found["tiny/no_split"]
    assert row["failed"] == "RuntimeError: INTERNAL: no lowering"
    assert not row.get("partial")
    assert (row["size"], row["model"]) == ("tiny", "no_split")
    assert found["tiny/llama"][-1]["tokens_per_second"] > 0
    assert set(small_models) == {"llama"}


def test_a_model_that_does_not_run_has_one_complete_row(small_models, monkeypatch):
    """Its failed row is neither partial nor timed again."""
    time_training = training_speed.time_training

    def refuse(programs, repeats):
        if name_of(programs) == "mamba1":
            small_models.append("mamba1")
            raise MemoryError("out of memory")
        return time_training(programs, repeats)

    monkeypatch.setattr(training_speed, "time_training", refuse)
    found = by_key(training_speed.measure(["tiny/mamba1", "tiny/llama"], {}))
    assert small_models.count("mamba1") == 1
    assert found["tiny/mamba1"][-1]["failed"] == "MemoryError: out of memory"
    assert found["tiny/llama"][-1]["tokens_per_second"] > 0
    assert not found["tiny/mamba1"][-1].get("partial")


def test_programs_compiled_in_advance_are_those_of_training(small_models):
    assert compilation.plan() == training_speed.plan()
    (row,) = compilation.measure(["tiny/llama"], {})
    assert row["key"] == "tiny/llama"
    assert row["compile_seconds"] > 0
    assert small_models == []
