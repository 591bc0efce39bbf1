import dataclasses
import shutil

import pytest

from flowhn_jax.commands import prepare as command
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_prepared, open_tokenizer
from flowhn_jax.data.prepare import prepare


@pytest.mark.parametrize(("vocab_size", "typed"), [(256, 384), (511, 512), (384, 512)])
def test_a_set_with_a_larger_vocabulary_than_the_model_is_refused(
    tmp_path, jsonl, prepared, tokenizer_json, vocab_size, typed
):
    if vocab_size > 257:
        prepared = prepare(str(jsonl), str(tokenizer_json), tmp_path / "set", context=32)
    config = Config()
    model = dataclasses.replace(config.model, context=32, vocab_size=vocab_size)
    with pytest.raises(
        ValueError,
        match=rf"model\.vocab_size must be at least {prepared.vocab_size}, .*; got {vocab_size}\. "
        rf"Train with --config\.model\.vocab_size={typed}$",
    ):
        open_prepared(dataclasses.replace(config, model=model), str(prepared.folder))
    model = dataclasses.replace(model, vocab_size=typed)
    open_prepared(dataclasses.replace(config, model=model), str(prepared.folder))


@pytest.mark.parametrize("has_file", [True, False])
def test_a_tokenizer_with_a_larger_vocabulary_than_the_model_is_refused(
    tmp_path, tokenizer_json, has_file
):
    """The tokenizer is tokenizer.json in the workdir, as in an imported run, or bytes."""
    if has_file:
        shutil.copy(tokenizer_json, tmp_path)
    model = dataclasses.replace(Config().model, vocab_size=200)
    tokens, typed = (512, 512) if has_file else (257, 384)
    with pytest.raises(
        ValueError, match=rf"at least {tokens}, .* Train with --config\.model\.vocab_size={typed}$"
    ):
        open_tokenizer(dataclasses.replace(Config(), model=model), str(tmp_path))


def test_help_of_the_tokenizer_names_the_end_of_text_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        command.run(["--help"])
    assert not ended.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "--eot_token" in text.split(" --tokenizer=TEXT ")[1].split(" --out=TEXT")[0]
