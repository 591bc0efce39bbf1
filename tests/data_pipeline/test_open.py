import dataclasses
import shutil

import pytest

from flowhn_jax.config import Config
from flowhn_jax.data.open import open_prepared, open_tokenizer
from flowhn_jax.data.prepare import main, prepare


@pytest.mark.parametrize(("vocab_size", "typed"), [(256, 384), (511, 512), (384, 512)])
def test_a_vocabulary_beyond_the_models_says_what_to_type(
    tmp_path, jsonl, prepared, tokenizer_json, vocab_size, typed
):
    if vocab_size > 257:
        prepared = prepare(str(jsonl), str(tokenizer_json), tmp_path / "set", context=32)
    config = Config()
    model = dataclasses.replace(config.model, context=32, vocab_size=vocab_size)
    with pytest.raises(
        ValueError,
        match=rf"has {prepared.vocab_size} tokens, but model\.vocab_size is {vocab_size}; to train "
        rf"a model of that size type --config\.model\.vocab_size={typed}$",
    ):
        open_prepared(dataclasses.replace(config, model=model), str(prepared.folder))
    model = dataclasses.replace(model, vocab_size=typed)
    open_prepared(dataclasses.replace(config, model=model), str(prepared.folder))


@pytest.mark.parametrize("has_file", [True, False])
def test_so_does_a_runs_own_tokenizer(tmp_path, tokenizer_json, has_file):
    """tokenizer.json in the workdir, as for every mode of an imported run, or bytes."""
    if has_file:
        shutil.copy(tokenizer_json, tmp_path)
    model = dataclasses.replace(Config().model, vocab_size=200)
    tokens, typed = (512, 512) if has_file else (257, 384)
    with pytest.raises(
        ValueError, match=rf"has {tokens} tokens, .* type --config\.model\.vocab_size={typed}$"
    ):
        open_tokenizer(dataclasses.replace(Config(), model=model), str(tmp_path))


def test_help_of_the_tokenizer_names_the_end_of_text_flag(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--eot_token" in text.split("--tokenizer TOKENIZER ", 2)[-1].split(" --out OUT")[0]
