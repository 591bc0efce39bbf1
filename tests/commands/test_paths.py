"""Every path that a user can give is local, in a bucket, or refused with one message."""

import importlib

import pytest

from flowhn_jax import storage
from flowhn_jax.commands.flags import Flags
from flowhn_jax.commands.main import COMMANDS
from flowhn_jax.config import DataConfig
from flowhn_jax.data.open import read_tokenizer
from flowhn_jax.data.prepare import ensure_embedded, prepare
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.sources import open_source
from flowhn_jax.data.synthetic import write
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation.prompt_files import read_prompts
from flowhn_jax.evaluation.task_files import find_file
from flowhn_jax.interop import huggingface, reference, tokenizer_files
from tests.command_line import ROOT, call

REFUSED = ("s3://bucket/x", "az://bucket/x", "abfs://c@a/x", "file:///tmp/x", "https://h/x")
REASON = "paths must be local or begin with gs://; got "

# Flags that are texts or names, and no paths.
TEXTS = {
    "budget",
    "checkpoint",
    "coordinator_address",
    "eot_token",
    "first_token",
    "lengths",
    "models",
    "prompt",
    "shard",
    "size",
    "tasks",
    "text_field",
    "topology",
}


def flags_of(command):
    flags = Flags()
    importlib.import_module(f"flowhn_jax.commands.{COMMANDS[command].module}").define(flags)
    return flags


PATHS = [(command, name) for command in COMMANDS for name in flags_of(command).paths]


def test_every_flag_with_a_text_is_a_path_or_listed_here():
    for command in COMMANDS:
        flags = flags_of(command)
        strings = {
            name
            for name in flags.values
            if flags.values[name].flag_type() == "string" and not name.startswith("config")
        }
        assert strings <= TEXTS | set(flags.paths), command
        assert not TEXTS & set(flags.paths), command
    assert len(PATHS) >= 16


def arguments(command, name, path):
    """Return a command line with this path, and what the command needs besides."""
    flags = flags_of(command)
    others = {
        each: {"size": "tiny", "topology": "v5e:4x4", "mode": "perplexity"}.get(each, "absent")
        for each in flags.values
        if flags.is_required(each) and each != "config"
    }
    given = [f"--{each}={value}" for each, value in (others | {name: path}).items()]
    return [f"flowhn {command}", *["--config=flowhn_tiny"] * flags.takes_config, *given]


@pytest.mark.parametrize(("command", "name"), PATHS)
@pytest.mark.parametrize("url", REFUSED)
def test_other_schemes_are_refused(command, name, url):
    with pytest.raises(ValueError, match=f"^--{name}: {REASON}'{url}'.*Mount that storage"):
        flags_of(command).parse(arguments(command, name, url))


@pytest.mark.parametrize(("command", "name"), PATHS)
def test_a_bucket_is_served(command, name):
    flags = flags_of(command)
    flags.parse(arguments(command, name, "gs://bucket/x"))
    assert flags.values[name].value == "gs://bucket/x"
    with pytest.raises(ValueError, match=rf"^--{name}: .*must begin with gs://; got 'gs:/b"):
        flags_of(command).parse(arguments(command, name, "gs:/bucket/x"))


@pytest.mark.parametrize(("command", "name"), PATHS)
def test_the_hub_is_only_read(command, name):
    flags = flags_of(command)
    given = arguments(command, name, "hf://someone/x")
    if name in ("source", "tokenizer"):
        flags.parse(given)
    else:
        with pytest.raises(ValueError, match=f"^--{name}: {REASON}'hf://someone/x'"):
            flags.parse(given)


@pytest.mark.parametrize("command", [each for each in COMMANDS if flags_of(each).takes_config])
@pytest.mark.parametrize("url", [*REFUSED, "gs://bucket/recipe.py"])
def test_a_recipe_is_local(command, url):
    with pytest.raises(ValueError, match=r"^--config: |^--config must be a local path"):
        flags_of(command).parse([command, f"--config={url}"])


@pytest.mark.parametrize("command", [each for each in COMMANDS if flags_of(each).takes_config])
@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/recipe.py", "x" * 300 + ":fac_split"])
def test_a_recipe_with_a_long_name_is_not_found(command, name):
    with pytest.raises(ValueError, match=r"^--config must be .*a file: File name too long\.$"):
        flags_of(command).parse([command, f"--config={name}"])


@pytest.mark.parametrize("url", REFUSED)
@pytest.mark.parametrize(
    "use",
    {
        "data.path": lambda url: DataConfig(path=url),
        "data.path of a mixture": lambda url: DataConfig(path=f"data/a:1,{url}:1"),
        "data.validation": lambda url: DataConfig(validation=f"n={url}"),
        "data.cache": lambda url: DataConfig(cache=url),
        "prepare": lambda url: prepare("embedded", "bytes", url),
        "embedded": lambda url: ensure_embedded(url, 32),
        "source": open_source,
        "tokenizer": load_tokenizer,
        "tokenizer of a run": read_tokenizer,
        "set": PreparedSet.open,
        "synthetic": lambda url: write(["needle"], 100, 1, 1, url),
        "prompts": read_prompts,
        "task": lambda url: find_file("piqa", url),
        "model": huggingface.load,
        "authors": lambda url: reference.load(url, "A"),
        "tokenizer files": tokenizer_files.read,
    }.values(),
)
def test_functions_refuse_them_too(use, url):
    with pytest.raises(ValueError, match=f"{REASON}'{url}'"):
        use(url)


@pytest.mark.parametrize(
    "given",
    [
        [
            "-m",
            "flowhn_jax.data.prepare",
            "--source=embedded",
            "--tokenizer=bytes",
            "--out=s3://bucket/set",
        ],
        ["train.py", "--config=flowhn_tiny", "--workdir=s3://bucket/run"],
        ["train.py", "--config=flowhn_tiny", "--workdir=x", "--config.data.path=s3://bucket/set"],
        ["-m", "flowhn_jax.bench", "suite", "--compare", "s3://bucket/a", "b"],
    ],
    ids=" ".join,
)
def test_commands_end_with_one_message_and_make_nothing(given):
    run = call(*given)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "paths must be local or begin with gs://; got 's3://bucket/" in run.stderr
    assert not (ROOT / "s3:").exists()
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(
    "given", [["--out=gs://bucket/x"], ["--compare", "gs://bucket/a", "gs://bucket/b"]]
)
def test_a_suite_is_local(given):
    run = call("-m", "flowhn_jax.bench", "suite", *given)
    assert run.returncode == 1
    assert "must be a local path; got 'gs://bucket/" in run.stderr
    assert run.stderr.count("\n") == 1


def test_the_packages_that_a_bucket_needs_are_named(monkeypatch):
    monkeypatch.setattr("flowhn_jax.storage.requests._is_installed", lambda module: False)
    message = "gs:// needs the packages gcsfs and google-cloud-storage: pip install gcsfs google-"
    for use in (storage.place, PreparedSet.open, open_source, load_tokenizer, huggingface.load):
        with pytest.raises(ValueError, match=message):
            use("gs://bucket/x")


def test_the_package_that_the_hub_needs_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    for use in (storage.readable_place, open_source, load_tokenizer, huggingface.load):
        with pytest.raises(ImportError, match="needs the package 'huggingface_hub': pip install"):
            use("hf://someone/model")
