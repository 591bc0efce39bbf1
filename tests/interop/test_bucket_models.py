"""Models are exported to a bucket and imported from one as they are locally."""

import json
import pathlib

import jax
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.interop import huggingface
from flowhn_jax.interop.transfer import export_run, import_run
from flowhn_jax.storage import place
from tests.small import small_baseline

TOKENIZER = pathlib.Path(__file__).parent.parent / "data" / "tokenizer.json"
CONFIG = small_baseline("llama", vocab_size=512)


@pytest.fixture(scope="module")
def params():
    """Return random parameters."""
    return models.init(CONFIG, jax.random.key(3))


@pytest.fixture
def source(tmp_path, params):
    """Return the local folder of a model with a tokenizer, a chat template among its files."""
    folder = tmp_path / "source"
    huggingface.save(folder, CONFIG, params)
    (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    settings = {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"top_k": 5}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    return folder


def objects(folder):
    return {name: file.read() for name, file in place(folder).walk()}


def upload(folder, target):
    for name, file in place(folder).walk():
        (place(target) / name).copy_from(file.local())


def same(tree, other):
    return jax.tree.all(jax.tree.map(np.array_equal, tree, other))


def test_there_and_back(bucket, tmp_path, source, params):
    upload(source, f"{bucket}/source")
    line = import_run(f"{bucket}/source", str(tmp_path / "run"))
    assert f"from {bucket}/source into" in line
    assert line.endswith("with its tokenizer")
    export_run(str(tmp_path / "run"), f"{bucket}/out")
    import_run(str(source), str(tmp_path / "local run"))
    export_run(str(tmp_path / "local run"), str(tmp_path / "local out"))
    exported = objects(f"{bucket}/out")
    assert exported == objects(tmp_path / "local out")
    assert exported["additional_chat_templates/tool.jinja"] == b"{{ tools }}"
    config, found = huggingface.load(f"{bucket}/out")
    assert config == huggingface.load(source)[0]
    assert same(found, params)
    export_run(str(tmp_path / "run"), f"{bucket}/out")  # the same files again
    assert objects(f"{bucket}/out") == exported


def test_shards_named_by_an_index(bucket, source, params):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(source / "model.safetensors", framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (source / "model.safetensors").unlink()
    names = sorted(arrays)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, owned in parts.items():
        save_file({name: arrays[name] for name in owned}, source / part)
    weights = {name: part for part, owned in parts.items() for name in owned}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    upload(source, f"{bucket}/source")
    assert same(huggingface.load(f"{bucket}/source")[1], params)


def test_what_is_refused(bucket, tmp_path, source):
    with pytest.raises(FileNotFoundError, match=f"'{bucket}/absent' is none"):
        huggingface.load(f"{bucket}/absent")
    upload(source, f"{bucket}/source")
    import_run(str(source), str(tmp_path / "run"))
    weights = place(f"{bucket}/source/model.safetensors")
    weights.write_whole(weights.read()[:-3])
    with pytest.raises(ValueError, match=f"'{weights}' must be a complete safetensors file"):
        huggingface.load(f"{bucket}/source")
    weights.remove()
    with pytest.raises(FileNotFoundError, match=f"no model.safetensors in '{bucket}/source'"):
        huggingface.load(f"{bucket}/source")
    (place(bucket) / "run" / "checkpoints" / "1" / "x").write_whole("x")
    with pytest.raises(ValueError, match="--out must not be the workdir of a run"):
        export_run(str(tmp_path / "run"), f"{bucket}/run")
    (place(bucket) / "out" / "chat_template.jinja").write_whole("x")
    with pytest.raises(ValueError, match=f"'{bucket}/out/chat_template.jinja' must not exist"):
        export_run(str(tmp_path / "run"), f"{bucket}/out")
    (place(bucket) / "file").write_whole("x")
    with pytest.raises(ValueError, match=f"'{bucket}/file' is a file"):
        export_run(str(tmp_path / "run"), f"{bucket}/file")
