import dataclasses
import json

import pytest

from flowhn_jax.compare.budget import Budget
from flowhn_jax.compare.training_plan import FILE, plan_steps, read_budget
from tests.small import small_baseline, small_config

OURS = small_config()
CONFIGS = {"ours": OURS, "llama": dataclasses.replace(OURS, model=small_baseline("llama"))}
DATA = "a corpus"
BUDGET = Budget("seconds", 10)


def measured(**seconds):
    return [{"model": name, "seconds": {"train": [each]}} for name, each in seconds.items()]


def test_a_plan_is_kept_whatever_is_measured_later(tmp_path):
    """So a comparison that continues on a slower day trains the same steps."""
    first = plan_steps({"ours": OURS}, str(tmp_path), BUDGET, measured(ours=0.1), DATA)
    assert first == {"ours": 100}
    later = plan_steps(CONFIGS, str(tmp_path), BUDGET, measured(ours=0.5, llama=0.2), DATA)
    assert later == {"ours": 100, "llama": 50}
    assert read_budget(str(tmp_path)) == BUDGET
    plan = json.loads((tmp_path / FILE).read_text())
    assert plan["models"]["ours"]["seconds_per_step"] == 0.1


def test_without_a_plan_there_is_no_budget(tmp_path):
    assert read_budget(str(tmp_path)) is None


def test_another_comparison_is_refused(tmp_path):
    plan_steps(CONFIGS, str(tmp_path), BUDGET, measured(ours=0.1, llama=0.2), DATA)
    other = dataclasses.replace(OURS, train=dataclasses.replace(OURS.train, batch_size=4))
    for configs, budget, message in (
        (CONFIGS, Budget("seconds", 20), "--budget must be seconds:10 in .*; got seconds:20. Give"),
        (CONFIGS, Budget("tokens", 10), "--budget must be seconds:10 in .*; got tokens:10. Give"),
        ({"ours": other}, BUDGET, "the config of ours must be .* in .*; got .*Give another --work"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_steps(configs, str(tmp_path), budget, measured(ours=0.1, llama=0.2), DATA)


@pytest.mark.parametrize("kind", ["tokens", "seconds"])
def test_seconds_of_another_device_are_refused(tmp_path, kind):
    """Tokens and FLOPs are the same on any device."""
    budget = Budget(kind, 9)
    expected = plan_steps(CONFIGS, str(tmp_path), budget, measured(ours=1, llama=1), DATA)
    path = tmp_path / FILE
    path.write_text(path.read_text().replace('"cpu"', '"NVIDIA H100"'))
    if kind == "tokens":
        assert plan_steps(CONFIGS, str(tmp_path), budget, [], DATA) == expected
        return
    with pytest.raises(ValueError, match=r"the device must be NVIDIA H100 in .*; got cpu"):
        plan_steps(CONFIGS, str(tmp_path), budget, [], DATA)


def test_other_data_are_refused(tmp_path):
    plan_steps(CONFIGS, str(tmp_path), BUDGET, measured(ours=1, llama=1), DATA)
    with pytest.raises(ValueError, match=r"the training data must be a corpus in .*; got another"):
        plan_steps(CONFIGS, str(tmp_path), BUDGET, [], "another")


DAMAGED = {
    "not JSON": "{",
    "not UTF-8": b"\xff",
    "a list": "[]",
    "no models": '{"budget": "tokens:5", "device": "cpu", "data": "mine"}',
    "no budget": '{"budget": "tokens", "device": "cpu", "data": "mine", "models": {}}',
    "a budget that is a number": '{"budget": 5, "device": "cpu", "data": "mine", "models": {}}',
    **{
        f"steps of {steps}": '{"budget": "tokens:5", "device": "cpu", "data": "mine", "models": '
        f'{{"ours": {{"config_hash": "0", "steps": {steps}}}}}}}'
        for steps in ('"5"', "0", "1.5", "true", "99999999999")
    },
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_plan_is_refused(tmp_path, text):
    (tmp_path / FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"training.json' is damaged; give another --workdir, or"):
        plan_steps(CONFIGS, str(tmp_path), BUDGET, [], DATA)
