import dataclasses

from flowhn_jax.interop import model_card
from tests.small import small_config


def rows(*bits):
    return [
        {"step": step, "tokens": 48 * step, "validation_bits_per_byte": value}
        for step, value in enumerate(bits, 1)
    ]


def test_a_card_says_what_was_trained():
    config = small_config("fai_split")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="data/mine"))
    text = model_card.render(config, 3, rows(4.0, 2.5, None, 2.0), has_code=True)
    lines = [line.replace(" ", "") for line in text.splitlines()]
    assert "|data|data/mine|" in lines
    assert "|steps|3|" in lines
    assert "|tokens|144|" in lines
    assert "|validation,step2|2.5000bitsperbyte|" in lines
    assert "|splitstrategy|fai_split|" in lines
    assert "trust_remote_code=True" in text
    assert model_card.is_ours(text)
    assert "python train.py" not in text


def test_a_card_has_the_commands_and_the_source_of_a_run():
    commands = ["python train.py --config=x --workdir=y", "python train.py --workdir=y"]
    config = small_config(train={"init_from": "runs/first"})
    text = model_card.render(config, 1, rows(4.0), has_code=False, commands=commands)
    assert "```\n" + "\n".join(commands) + "\n```\n" in text
    assert "|initialparameters|runs/first|" in [line.replace(" ", "") for line in text.splitlines()]
    untrained = model_card.render(config, 0, [], has_code=False, commands=commands)
    assert commands[0] not in untrained


def test_a_model_that_was_trained_elsewhere_has_no_training():
    text = model_card.render(small_config(), 0, [], has_code=False)
    assert "## Training" not in text
    assert "trust_remote_code" not in text
    assert not model_card.is_ours("# Mine")
