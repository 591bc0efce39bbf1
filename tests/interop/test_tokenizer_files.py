"""Exports keep what the imported folder has on tokenizer, chat and generation."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from flowhn_jax import models
from flowhn_jax.data.open import read_tokenizer
from flowhn_jax.data.tokenizer import ByteTokenizer, begin, load_tokenizer
from flowhn_jax.interop import huggingface, tokenizer_files
from flowhn_jax.interop.transfer import export_run, import_run
from tests.small import small_baseline

CONFIG = small_baseline("mamba1", vocab_size=300)
TOKENS = ["<pad>", "<s>", "</s>", "<|im_end|>", "H", "e", "Ġ"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
SETTINGS = {
    "add_bos_token": True,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
    "eos_token": "<|im_end|>",
    "model_max_length": 24,
    "pad_token": "<pad>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": "of tokenizer_config.json; chat_template.jinja takes precedence",
}
GENERATION = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [3, 2],
    "pad_token_id": 0,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
}
IDS = {"bos_token_id": 1, "eos_token_id": [3, 2], "pad_token_id": 0}
FILES = {
    "tokenizer_config.json": json.dumps(SETTINGS),
    "special_tokens_map.json": json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>"}),
    "added_tokens.json": json.dumps({"<pad>": 0}),
    "generation_config.json": json.dumps(GENERATION, indent=4),
    "chat_template.jinja": TEMPLATE + "\r\n",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "additional_chat_templates/rag.jinja": "Ünïcode {{ documents }}",
}


def library_tokenizer():
    """Return a byte-level tokenizer that begins every text with <s>."""
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    found.add_special_tokens(TOKENS[:4])
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    first = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    found.post_processor = tokenizers.processors.Sequence(
        [tokenizers.processors.ByteLevel(trim_offsets=False), first]
    )
    return found


def zeros(config):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), models.abstract_params(config))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder with only a model."""
    folder = tmp_path_factory.mktemp("model")
    huggingface.save(folder, CONFIG, zeros(CONFIG))
    return folder


def make_source(model, folder, files=None, **config):
    """Copy the model to `folder`; add a tokenizer, `files` and keys of config.json."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    library_tokenizer().save(str(folder / "tokenizer.json"))
    for name, text in (FILES if files is None else files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def import_and_export(source, root):
    import_run(str(source), str(root / "work"))
    export_run(str(root / "work"), str(root / "out"))
    return root / "out"


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """Return a folder like that of a published chat model, and its export."""
    root = tmp_path_factory.mktemp("chat")
    keys = IDS | {"temperature": 0.5, "transformers_version": "4.55.0"}
    source = make_source(model, root / "source", **keys)
    return source, import_and_export(source, root)


def test_files_are_copied_byte_for_byte(exported):
    source, out = exported
    for folder in (out, out.parent / "work"):
        for name in FILES:
            assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    assert json.loads((out / "tokenizer.json").read_text()) == json.loads(
        (source / "tokenizer.json").read_text()
    )
    assert not (out / "hf_config.json").exists()


def test_config_json_keeps_its_ids_and_settings(exported):
    config = json.loads((exported[1] / "config.json").read_text())
    assert {key: config[key] for key in IDS} == IDS
    assert config["temperature"] == 0.5
    assert "transformers_version" not in config


def test_the_end_of_text_token_is_that_of_the_chat_model(exported):
    tokenizer = read_tokenizer(str(exported[1].parent / "work"))
    assert (tokenizer.eot_token, tokenizer.eot_id) == ("<|im_end|>", 3)


def test_transformers_reads_the_same_from_the_export(exported):
    transformers = pytest.importorskip("transformers")
    before, after = (transformers.AutoTokenizer.from_pretrained(each) for each in exported)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "model_max_length"):
        assert getattr(after, name) == getattr(before, name), name
    assert (after.bos_token_id, after.eos_token_id, after.pad_token_id) == (1, 3, 0)
    assert after.chat_template == before.chat_template
    assert set(after.chat_template) == {"default", "tool_use", "rag"}
    assert after("He H").input_ids == before("He H").input_ids == [1, 4, 5, 6, 4]
    chat = [{"role": "user", "content": "e"}]
    default = dict(chat_template="default", tokenize=False)
    assert after.apply_chat_template(chat, **default) == "<s>[e]"
    configs = [transformers.GenerationConfig.from_pretrained(each) for each in exported]
    assert configs[0].to_diff_dict() == configs[1].to_diff_dict()
    assert (configs[1].temperature, configs[1].eos_token_id) == (0.6, [3, 2])
    configs = [transformers.AutoConfig.from_pretrained(each) for each in exported]
    for key, value in IDS.items():
        assert getattr(configs[0], key) == getattr(configs[1], key) == value


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({}, {}, "</s>"),
        ({}, {"eos_token_id": 3}, "<|im_end|>"),
        ({}, {"eos_token_id": [3, 2]}, "<|im_end|>"),
        ({}, {"eos_token_id": 99}, "</s>"),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}}}, {}, "<|im_end|>"),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, {"eos_token_id": 3}, "</s>"),
        (  # In files of transformers before 4.34, the map takes precedence.
            {
                "tokenizer_config.json": {"eos_token": "</s>"},
                "special_tokens_map.json": {"eos_token": "<|im_end|>"},
            },
            {},
            "<|im_end|>",
        ),
        (
            {
                "tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {}},
                "special_tokens_map.json": {"eos_token": "<|im_end|>"},
            },
            {},
            "</s>",
        ),
        ({"tokenizer_config.json": {"eos_token": None}}, {"eos_token_id": 3}, "<|im_end|>"),
    ],
)
def test_the_end_of_text_token_is_found(tmp_path, files, config, expected):
    library_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    texts = tokenizer_files.read(tmp_path)
    texts["hf_config.json"] = tokenizer_files.keys_to_keep(config)
    path = tmp_path / "tokenizer.json"
    tokenizer = load_tokenizer(str(path), tokenizer_files.end_of_text(texts, path))
    assert tokenizer.eot_token == expected
    tokenizer_files.write(tmp_path, tokenizer_files.files_for(texts, tokenizer))
    assert read_tokenizer(str(tmp_path)).eot_token == expected


def plain(path, first="<s>", eot_token="</s>"):
    """Return the files and keys of config.json for data prepared with a tokenizer.json alone."""
    library = library_tokenizer()
    if first is None:
        library.post_processor = tokenizers.processors.ByteLevel()
    if first == "[CLS]":
        library.add_special_tokens(["[CLS]", "[SEP]"])
        library.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 8), ("[CLS]", 7))
    library.save(str(path))
    tokenizer = load_tokenizer(str(path), eot_token)
    texts = tokenizer_files.files_for({}, tokenizer)
    return texts, tokenizer_files.config_keys(texts, tokenizer)


@pytest.mark.parametrize(("first", "bos"), [("<s>", 1), ("[CLS]", 7), (None, None)])
def test_the_files_of_a_plain_tokenizer_name_its_tokens(tmp_path, first, bos):
    texts, keys = plain(tmp_path / "tokenizer.json", first)
    assert set(texts) == {"tokenizer.json", "tokenizer_config.json"}
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    if first is not None:
        expected["bos_token"] = first
    assert json.loads(texts["tokenizer_config.json"]) == expected
    assert keys == {"bos_token_id": bos, "eos_token_id": 2, "pad_token_id": None}


@pytest.mark.parametrize("first_token", ["eot", "none"])
def test_bytes_have_files_with_the_same_ids(tmp_path, first_token):
    tokenizer = ByteTokenizer(first_token)
    texts = tokenizer_files.files_for({}, tokenizer)
    assert set(texts) == {"tokenizer.json", "tokenizer_config.json"}
    keys = tokenizer_files.config_keys(texts, tokenizer)
    bos = 256 if first_token == "eot" else None
    assert keys == {"bos_token_id": bos, "eos_token_id": 256, "pad_token_id": None}
    tokenizer_files.write(tmp_path, texts)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.get_vocab_size() == tokenizer.vocab_size
    rng = np.random.default_rng()
    for text in ("", " a  b\n\t", "Grüße, 世界 \U0001f600\x00", "".join(map(chr, range(1, 256)))):
        text += "".join(map(chr, rng.integers(32, 0xD800, 20)))
        ids = begin(tokenizer, tokenizer.encode(text).tolist())
        assert library.encode(text).ids == ids
        assert library.decode(ids) == tokenizer.decode(ids) == text
    again = read_tokenizer(tmp_path)
    assert (again.eot_id, again.first_ids) == (tokenizer.eot_id, tokenizer.first_ids)


def test_transformers_reads_the_byte_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer_files.write(tmp_path, tokenizer_files.files_for({}, ByteTokenizer()))
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert found("é a").input_ids == [256, *"é a".encode()]
    assert found.decode([256, *"é  a ,".encode()], skip_special_tokens=True) == "é  a ,"
    assert (found.bos_token_id, found.eos_token_id) == (256, 256)


def test_an_import_without_a_tokenizer_adds_no_ids():
    """For a missing key, transformers uses its default, both for the source and for the export."""
    kept = tokenizer_files.keys_to_keep({"tokenizer_class": "A", "top_k": 5, "hidden_size": 8})
    keys = tokenizer_files.config_keys({"hf_config.json": kept}, load_tokenizer("bytes"))
    assert keys == {"tokenizer_class": "A", "top_k": 5}


@pytest.mark.parametrize("kind", ["llama", "mamba1", "shm"])
def test_transformers_reads_a_plain_tokenizer(tmp_path, kind):
    """Its ids are those of the library; transformers does not know the model 'shm'."""
    transformers = pytest.importorskip("transformers")
    texts, keys = plain(tmp_path / "tokenizer.json")
    config = small_baseline(kind)
    huggingface.save(tmp_path, config, zeros(config), keys)
    tokenizer_files.write(tmp_path, texts)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, None)
    assert found("He H").input_ids == library_tokenizer().encode("He H").ids == [1, 4, 5, 6, 4]
    assert len(found) == len(TOKENS)
    if kind != "shm":
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        settings = transformers.GenerationConfig.from_model_config(config)
        ids = settings.bos_token_id, settings.eos_token_id, settings.pad_token_id
        assert ids == (1, 2, None)


def test_unknown_ids_are_none(model):
    """The defaults of Mamba's class would be 0."""
    config = json.loads((model / "config.json").read_text())
    assert {config[key] for key in IDS} == {None}


def test_a_folder_without_a_tokenizer_keeps_its_generation_settings(model, tmp_path):
    source = make_source(model, tmp_path / "source", **IDS)
    (source / "tokenizer.json").unlink()
    out = import_and_export(source, tmp_path)
    names = {path.name for path in out.iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in IDS} == IDS


BAD = [
    ("tokenizer_config.json", "{", "is not JSON"),
    ("tokenizer_config.json", "[1]", r"must hold an object; got \[1\]"),
    ("tokenizer_config.json", '{"bos_token": 5}', "bos_token in .* must be a string, .*; got 5"),
    ("tokenizer_config.json", '{"pad_token": {"content": 5}}', "pad_token in .* must be a"),
    ("tokenizer_config.json", '{"chat_template": 5}', "chat_template in .* a string.*; got 5"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', "'name' and 'template'"),
    ("tokenizer_config.json", '{"eos_token": "<none>"}', "eot_token must be .*; got '<none>'"),
    ("special_tokens_map.json", '"<s>"', "must hold an object; got '<s>'"),
    ("special_tokens_map.json", '{"eos_token": [1]}', r"eos_token in .* must be .*; got \[1\]"),
    ("added_tokens.json", "[]", r"must hold an object; got \[\]"),
    ("generation_config.json", "[" * 10_000, "is not JSON: it is nested too deeply"),
    ("generation_config.json", "null", "must hold an object; got None"),
    ("chat_template.jinja", b"\xff", "must be UTF-8"),
    ("chat_template.jinja", 100_000_000, "at most 16,777,216 bytes in total"),
    ("chat_template.jinja", None, "must be a file; it is not"),
    ("additional_chat_templates/a.jinja", None, "must be a file; it is not"),
    ("additional_chat_templates/a.jinja", b"\x80", "a.jinja' must be UTF-8"),
    ("config.json", {"eos_token_id": "</s>"}, "eos_token_id must be a token's id, .*; got '</s>'"),
    (
        "config.json",
        {"pad_token_id": [True]},
        r"pad_token_id must be a token's id, .*; got \[True\]",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=range(len(BAD)))
def test_unreadable_files_give_one_message(model, tmp_path, name, content, message):
    """`None` makes a folder of that name, a number a file of that size; no workdir is left."""
    is_config = name == "config.json"
    source = make_source(model, tmp_path / "source", {}, **(content if is_config else {}))
    path = source / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, int):
        with path.open("wb") as file:
            file.truncate(content)
    elif not is_config:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        import_run(str(source), str(tmp_path / "work"))
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work").exists()


def test_links_to_files_are_followed_and_others_refused(model, tmp_path):
    """In the cache of the Hugging Face hub, all files are links."""
    source = make_source(model, tmp_path / "source")
    for path in [*source.glob("*.json*"), *source.glob("*/*.jinja")]:
        blob = tmp_path / f"blob-{path.name}"
        path.rename(blob)
        path.symlink_to(blob)
    texts = tokenizer_files.read(source)
    assert texts == FILES
    (tmp_path / "blob-generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"generation_config.json' must be a file; it is not"):
        tokenizer_files.read(source)
    (source / "generation_config.json").unlink()
    (source / "generation_config.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"generation_config.json' must be a file; it is not"):
        tokenizer_files.read(source)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    config = small_baseline("mamba1", vocab_size=6)
    huggingface.save(tmp_path / "model", config, zeros(config))
    source = make_source(tmp_path / "model", tmp_path / "source", {})
    with pytest.raises(
        ValueError, match=r"vocab_size must be at least the 7 tokens .*; got 6\. .*\(7\) adds"
    ):
        import_run(str(source), str(tmp_path / "work"))


def test_an_export_does_not_mix_files_of_two_models(exported, tmp_path):
    """Nor does it write through a link, or into a run."""
    out = tmp_path / "out"
    shutil.copytree(exported[1], out)
    work = str(exported[1].parent / "work")
    export_run(work, str(out))  # the same files again
    other = out / "additional_chat_templates" / "other.jinja"
    other.write_text("{{ old }}")
    with pytest.raises(ValueError, match=r"other\.jinja' must not exist, as the exported model"):
        export_run(work, str(out))
    other.unlink()
    for name in ("tokenizer.json", *FILES):
        kept = FILES.keys() | {"tokenizer.json"}
        tokenizer_files.check_replaces_all(out, kept)
        with pytest.raises(ValueError, match=f"{name}' must not exist"):
            tokenizer_files.check_replaces_all(out, kept - {name})
    shutil.rmtree(out / "additional_chat_templates")
    precious = tmp_path / "precious"
    precious.mkdir()
    (out / "additional_chat_templates").symlink_to(precious)
    with pytest.raises(ValueError, match="must be a folder; it is a link"):
        export_run(work, str(out))
    assert not list(precious.iterdir())
    config = pathlib.Path(work, "config.json").read_text()
    with pytest.raises(ValueError, match="--out must not be the workdir of a run"):
        export_run(work, work)
    assert pathlib.Path(work, "config.json").read_text() == config


@pytest.mark.parametrize("recorded", ["auto", "bos", "eot", "none", "several"])
@pytest.mark.parametrize("first_token", ["bos", "eot", "none"])
def test_the_token_that_begins_a_text_is_recorded(tmp_path, recorded, first_token):
    """Whatever the settings of the imported tokenizer say, and only if they say otherwise."""
    path = tmp_path / "tokenizer.json"
    library_tokenizer().save(str(path))
    settings = {"eos_token": "</s>", "bos_token": "<s>"}
    if recorded != "auto":
        settings["flowhn_jax"] = {"first_token": recorded}
    tokenizer = load_tokenizer(str(path), "</s>", first_token=first_token)
    texts = {tokenizer_files.SETTINGS: json.dumps(settings)}
    files = tokenizer_files.files_for(texts, tokenizer)
    is_recorded = recorded == first_token or (recorded, first_token) == ("auto", "bos")
    assert (files[tokenizer_files.SETTINGS] == texts[tokenizer_files.SETTINGS]) is is_recorded
    tokenizer_files.write(tmp_path, files)
    assert read_tokenizer(tmp_path).first_ids == tokenizer.first_ids


@pytest.mark.parametrize("recorded", ["eot", "none"])
@pytest.mark.parametrize("first_token", ["eot", "none"])
def test_the_token_that_begins_bytes_is_recorded(recorded, first_token):
    texts = {tokenizer_files.SETTINGS: json.dumps({"flowhn_jax": {"first_token": recorded}})}
    files = tokenizer_files.files_for(texts, ByteTokenizer(first_token))
    found = json.loads(files[tokenizer_files.SETTINGS])
    assert found.get("flowhn_jax", {"first_token": "eot"}) == {"first_token": first_token}
