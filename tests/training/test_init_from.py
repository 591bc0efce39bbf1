"""Runs that start from other runs' parameters or from folders of transformers."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.parameters import load_params, save_params
from flowhn_jax.checkpoints.state import init_state, state_shardings
from flowhn_jax.commands import train_recipe
from flowhn_jax.commands.flags import Flags
from flowhn_jax.config import MeshConfig
from flowhn_jax.data.open import open_tokenizer, read_tokenizer
from flowhn_jax.data.prepare import prepare
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.tokenizer import ByteTokenizer
from flowhn_jax.evaluation.chat import ChatTemplates
from flowhn_jax.interop import byte_tokenizer, huggingface, source, transfer
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.storage import place
from flowhn_jax.training.start import new_state
from flowhn_jax.training.trainer import fit
from tests.command_line import ROOT
from tests.small import small_baseline, small_config
from tests.storage.test_hub import hub  # noqa: F401

TEXT = ROOT / "tests" / "data" / "wikitext.txt"
TOKENIZER = ROOT / "tests" / "data" / "tokenizer.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a prepared set of bytes in windows of 24."""
    folder = str(tmp_path_factory.mktemp("data") / "set")
    prepare(str(TEXT), "bytes", folder, context=24)
    return folder


@pytest.fixture(scope="module")
def params():
    """Return the parameters of `CONFIG`'s model, none of which are initial values of a new run."""
    return models.init(CONFIG.model, jax.random.key(7))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, params):
    """Return a workdir with these parameters."""
    folder = str(tmp_path_factory.mktemp("runs") / "source")
    workdir_lib.make(folder)
    workdir_lib.write_config(folder, CONFIG)
    save_params(folder, CONFIG.model, params)
    return folder


CONFIG = small_config("fai_split", model={"blocks": 1}, mesh={"data": 1})


def run_config(source, data="", **groups):
    """Return `CONFIG` with a source and data; `model` and `split` override its model."""
    groups = {"mesh": {"data": 1}, **groups}
    train = {"init_from": str(source), "steps": 2, "eval_windows": 4, **groups.pop("train", {})}
    model = {"blocks": 1, **groups.pop("model", {})}
    strategy = groups.pop("strategy", "fai_split")
    return small_config(strategy, model=model, train=train, data={"path": data}, **groups)


def start(config, data):
    """Return the state at step 0 on the config's mesh, and the lines that are logged."""
    mesh = make_mesh(config.mesh, config.train.batch_size)
    lines: list[str] = []
    with jax.set_mesh(mesh):
        state = new_state(config, mesh, PreparedSet.open(data), lambda: False, lines.append)
    assert state is not None
    return state, lines


@pytest.mark.parametrize("kind", ["workdir", "folder"])
@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 1, "fsdp": 4, "tensor": 2}])
def test_the_state_is_new_but_for_the_parameters(kind, axes, workdir, data, params, tmp_path):
    """Bit for bit the source's, each device holding its part; the rest as in any new run."""
    if kind == "folder":
        huggingface.save(tmp_path, CONFIG.model, params)
        (tmp_path / "tokenizer.json").write_text(byte_tokenizer.to_json(ByteTokenizer()))
    config = run_config(workdir if kind == "workdir" else tmp_path, mesh=axes)
    state, lines = start(config, data)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    mesh = make_mesh(config.mesh, config.train.batch_size)
    shardings = state_shardings(config, mesh)
    for leaf, sharding in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    fresh = init_state(config, mesh)
    rest, expected = (dataclasses.replace(each, params={}) for each in (state, fresh))
    jax.tree.map(np.testing.assert_array_equal, rest, expected)
    assert lines == [f"parameters from {config.train.init_from}"]


def quiet():
    """Take the place of what a run prints after each step."""


def test_a_run_resumes_without_its_source(workdir, data, tmp_path):
    """Its first checkpoint has all that it needs; config.json keeps the source's name."""
    gone, run = tmp_path / "source", str(tmp_path / "run")
    shutil.copytree(workdir, gone)
    fit(run_config(gone, data), run, quiet)
    shutil.rmtree(gone)
    config = run_config(gone, data, train={"steps": 3})
    assert fit(config, run, quiet)
    assert workdir_lib.read_config(run).train.init_from == str(gone)
    mesh = make_mesh(config.mesh, 8)
    before = load_params(workdir, config.model, mesh)
    after = load_params(run, config.model, mesh)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 0.01  # three steps from the source


CHAT = {
    "tokenizer_config.json": '{"eos_token": "<|endoftext|>", "bos_token": "<|pad|>", '
    '"add_bos_token": true, "model_max_length": 96}',
    "chat_template.jinja": "{% for message in messages %}<{{ message.content }}>{% endfor %}",
    "generation_config.json": '{"temperature": 0.7, "do_sample": true}',
}


@pytest.mark.parametrize("first_token", ["auto", "eot"])
def test_an_export_has_the_sources_chat_template(first_token, tmp_path):
    """And its settings of generation; neither the source nor the data are needed any more."""
    gone, run, exported = (tmp_path / name for name in ("gone", "run", "exported"))
    model = dataclasses.replace(CONFIG.model, vocab_size=512)
    huggingface.save(gone / "model", model, models.init(model, jax.random.key(0)))
    shutil.copy(TOKENIZER, gone / "model")
    for name, text in CHAT.items():
        (gone / "model" / name).write_text(text)
    spec, data = str(gone / "model/tokenizer.json"), str(gone / "set")
    prepare(str(TEXT), spec, data, context=24, first_token=first_token)
    trained = PreparedSet.open(data).tokenizer
    config = run_config(gone / "model", data, model={"vocab_size": 512}, train={"steps": 1})
    assert fit(config, str(run), quiet)
    shutil.rmtree(gone)
    transfer.export_run(str(run), str(exported))
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (exported / name).read_text() == CHAT[name]
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    own = {"add_bos_token": False, "flowhn_jax": {"first_token": "eot"}}
    changes = {} if first_token == "auto" else own
    assert settings == json.loads(CHAT["tokenizer_config.json"]) | changes
    for tokenizer in (open_tokenizer(config, str(run)), read_tokenizer(exported)):
        assert tokenizer.fingerprint == trained.fingerprint
        assert tokenizer.first_ids == trained.first_ids
        assert ChatTemplates.read(tokenizer).template() == CHAT["chat_template.jinja"]


@pytest.mark.parametrize("kind", ["workdir", "folder"])
def test_a_source_in_a_bucket(kind, workdir, data, params, bucket, tmp_path):
    """The run that begins with it is bit for bit the one that begins with a local copy."""
    local = tmp_path / "local"
    if kind == "folder":
        transfer.export_run(workdir, str(local))
    else:
        shutil.copytree(workdir, local)
    for name, file in place(local).walk():
        (place(bucket) / "source" / name).copy_from(file.local())
    sources = {"ours": str(local), "theirs": f"{bucket}/source"}
    found = {}
    for name, path in sources.items():
        config = run_config(path, data, train={"steps": 1})
        assert fit(config, str(tmp_path / name), quiet)
        mesh = make_mesh(config.mesh, config.train.batch_size)
        found[name] = load_params(str(tmp_path / name), config.model, mesh)
    jax.tree.map(np.testing.assert_array_equal, found["ours"], found["theirs"])
    kept = [(tmp_path / name / "tokenizer_config.json").is_file() for name in sources]
    assert kept == [kind == "folder"] * 2


def test_a_source_with_a_tokenizer_of_bytes_alone(data, params, tmp_path):
    """It has no tokenizer_config.json; a run's export and an import's have both files."""
    source_folder = tmp_path / "source"
    huggingface.save(source_folder, CONFIG.model, params)
    (source_folder / "tokenizer.json").write_text(byte_tokenizer.to_json(ByteTokenizer()))
    assert fit(run_config(source_folder, data, train={"steps": 1}), str(tmp_path / "run"), quiet)
    line = transfer.import_run(str(source_folder), str(tmp_path / "imported"))
    assert line.endswith("with its tokenizer")
    for run in ("run", "imported"):
        transfer.export_run(str(tmp_path / run), str(tmp_path / f"{run} out"))
        found = source.read_tokenizer(str(tmp_path / f"{run} out"))
        assert found is not None
        assert found.fingerprint == "bytes"
        assert (tmp_path / f"{run} out" / "tokenizer_config.json").is_file()


def test_a_source_on_the_hub(hub, workdir, data, params, tmp_path):  # noqa: F811
    transfer.export_run(workdir, str(tmp_path / "local"))
    files = {name: file.read() for name, file in place(tmp_path / "local").walk()}
    hub.repositories["models/me/model"] = files
    config = run_config("hf://me/model")
    assert source.read_model(config.train.init_from) == CONFIG.model
    state, lines = start(config, data)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert lines == ["parameters from hf://me/model"]
    source.keep_files("hf://me/model", ByteTokenizer(), str(tmp_path / "kept"))
    kept = (tmp_path / "kept" / "tokenizer_config.json").read_bytes()
    assert kept == files["tokenizer_config.json"]


def test_a_longer_context_and_another_split(workdir, data, params, tmp_path):
    longer = str(tmp_path / "set")
    prepare(str(TEXT), "bytes", longer, context=48)
    for groups, folder in (({"model": {"context": 48}}, longer), ({"strategy": "fac_split"}, data)):
        config = run_config(workdir, **groups)
        state, lines = start(config, folder)
        jax.tree.map(np.testing.assert_array_equal, state.params, params)
        assert lines[0].startswith(f"changed from {workdir}: model.")
    # fai_split at a longer context is the same model.
    tokens = np.random.default_rng().integers(0, 257, (1, 24))
    longer_model = run_config(workdir, model={"context": 48}).model
    found, expected = (models.forward(m, params, tokens) for m in (longer_model, CONFIG.model))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"model": {"mlp_width": 40}},
            r"differs in model.mlp_width: 24 -> 40; .* shape: .*mlp.down_proj.kernel "
            r"\(24, 16\) -> \(40, 16\)",
        ),
        ({"strategy": "no_split"}, r"split.strategy: 'fai_split' -> 'no_split'; .*branch_proj"),
        ({"model": {"kv_heads": 4, "heads": 8}}, r"model.heads: 4 -> 8"),
        ({"model": {"tie_embeddings": True}}, r"head.kernel \(16, 257\) -> absent"),
    ],
)
def test_a_model_that_does_not_fit_is_one_message(workdir, data, groups, message):
    with pytest.raises(ValueError, match=message) as caught:
        start(run_config(workdir, **groups), data)
    assert "\n" not in str(caught.value)


def test_the_same_shapes_in_other_heads_do_not_fit(workdir):
    llama = small_baseline("llama", head_dim=4)
    other = dataclasses.replace(llama, heads=2, kv_heads=1, head_dim=8)
    shapes = (jax.tree.map(jnp.shape, models.abstract_params(each)) for each in (llama, other))
    assert len({str(each) for each in shapes}) == 1
    with pytest.raises(ValueError, match=r"model.head_dim: 4 -> 8; model.heads: 4 -> 2"):
        source.check_fit(workdir, llama, other)
    rope = dataclasses.replace(llama, rope_theta=5e5)
    assert source.check_fit(workdir, llama, rope) == ["model.rope_theta: 10000.0 -> 500000.0"]


def test_data_of_another_tokenizer_are_refused(data, params, tmp_path):
    model = dataclasses.replace(CONFIG.model, vocab_size=512)
    huggingface.save(tmp_path, model, models.init(model, jax.random.key(0)))
    shutil.copy(TOKENIZER, tmp_path)
    config = run_config(tmp_path, model={"vocab_size": 512})
    with pytest.raises(ValueError, match=r"must have the tokenizer of .* they have bytes") as found:
        start(config, data)
    flags = str(found.value).rpartition("Prepare them with ")[2].split()
    assert flags[0] == f"--tokenizer={tmp_path / 'tokenizer.json'}"
    prepare(str(TEXT), flags[0].partition("=")[2], str(tmp_path / "set"), context=24)
    start(config, str(tmp_path / "set"))
    (tmp_path / "tokenizer.json").unlink()
    assert "no tokenizer" in start(config, data)[1][0]


def test_an_export_of_bytes_fits_data_of_bytes(data, workdir, tmp_path):
    """Imported or not, and also if transformers saved its tokenizer again."""
    exported, again = tmp_path / "exported", tmp_path / "again"
    transfer.export_run(workdir, str(exported))
    line = transfer.import_run(str(exported), str(again))
    assert line.endswith("with its tokenizer")
    for folder in (exported, again):
        start(run_config(folder), data)
    transfer.export_run(str(again), str(tmp_path / "back"))
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors")
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (exported / name).read_bytes()
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    library.save(str(exported / "tokenizer.json"), pretty=False)
    resaved = (exported / "tokenizer.json").read_text()
    assert resaved != byte_tokenizer.to_json(ByteTokenizer())
    start(run_config(exported), data)
    changed = json.loads(resaved)
    changed["pre_tokenizer"]["use_regex"] = True
    changed["pre_tokenizer"]["add_prefix_space"] = True
    assert not byte_tokenizer.is_bytes(json.dumps(changed))


def test_a_folder_that_is_no_source_is_named(data, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"train.init_from must be the workdir of a run, or"
    ):
        start(run_config(tmp_path), data)
    workdir_lib.write_config(str(tmp_path), CONFIG)
    with pytest.raises(FileNotFoundError, match=r"train.init_from must hold a checkpoint"):
        start(run_config(tmp_path), data)
    with pytest.raises(ValueError, match=r"train.init_from: paths must be local or begin with gs:"):
        run_config("s3://bucket/model")


def parsed(monkeypatch, *arguments):
    """Return the config of a command line of `flowhn train`."""
    argv = ["train.py", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", argv)
    flags = Flags()
    parse = train_recipe.define(flags)
    flags.path("workdir", "folder.", required=True)
    flags.parse(argv)
    return parse()


def test_the_model_is_the_sources_unless_a_key_is_typed(monkeypatch, workdir, tmp_path):
    run = tmp_path / "run"
    arguments = ["--config=flowhn_tiny", f"--config.train.init_from={workdir}", f"--workdir={run}"]
    typed = ["--config.model.context=48", "--config.model.split.strategy=fac_split"]
    found = parsed(monkeypatch, *arguments)
    assert found.model == CONFIG.model
    assert found.train.learning_rate == 3e-3  # the recipe's
    found = parsed(monkeypatch, *arguments, *typed)
    split = dataclasses.replace(CONFIG.model.split, strategy="fac_split")
    assert found.model == dataclasses.replace(CONFIG.model, context=48, split=split)
    # Once the run has a checkpoint, the model is its own, and the source is not looked at.
    workdir_lib.make(str(run))
    workdir_lib.write_config(str(run), found)
    save_params(str(run), found.model, models.init(found.model, jax.random.key(0)))
    monkeypatch.setattr(source, "read_model", None)
    assert parsed(monkeypatch, *arguments).model == found.model


def test_the_workdir_alone_is_enough(monkeypatch, tmp_path):
    run = tmp_path / "run"
    split = {"balance": 0.375, "strategy": "fac_split"}
    config = small_config(split=split, model={"head_dim": 6}, train={"init_from": "gone"})
    config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2))
    workdir_lib.make(str(run))
    workdir_lib.write_config(str(run), config)
    save_params(str(run), config.model, models.init(config.model, jax.random.key(0)))
    assert parsed(monkeypatch, f"--workdir={run}") == config
    for arguments in (
        ["--workdir", run, "--config.train.steps=2000"],
        ["--config.train.steps=2000", f"--workdir={run}"],
    ):
        found = parsed(monkeypatch, *arguments)
        assert found.train == dataclasses.replace(config.train, steps=2000)
        assert (found.model, found.mesh) == (config.model, config.mesh)
    with_both = parsed(monkeypatch, "--config=flowhn_tiny", f"--workdir={run}")
    assert with_both.model != config.model
    with pytest.raises(ValueError, match=r"--config must be given, .* unless --workdir is the fol"):
        parsed(monkeypatch, f"--workdir={tmp_path / 'new'}")
    (run / "config.json").write_text("{")
    (run / "checkpoints" / "0" / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(ValueError, match="is not JSON"):
        parsed(monkeypatch, f"--workdir={run}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mamba1", "mamba2", "jamba", "falcon_h1", "hymba"])
def test_every_kind_trains_on(kind, data, tmp_path):
    """Two steps on a mesh, from a folder in the layout of transformers."""
    model = small_baseline(kind, vocab_size=257, dtype="auto")
    huggingface.save(tmp_path / "model", model, models.init(model, jax.random.key(0)))
    train = {"init_from": str(tmp_path / "model"), "steps": 2, "batch_size": 8, "eval_windows": 8}
    groups = {"train": train, "data": {"path": data}, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
    keys = config_lib.to_dict(source.read_model(str(tmp_path / "model")))
    config = config_lib.parse({"model": keys, **groups})
    steps = []
    assert fit(config, str(tmp_path / "run"), lambda: steps.append(1))
    assert len(steps) == 2
