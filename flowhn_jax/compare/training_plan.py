"""How many steps each model of a comparison trains, chosen once and kept in the workdir."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flowhn_jax.compare.budget import Budget, parse_budget, seconds_per_step, steps_for
from flowhn_jax.compare.speed import Measurement, config_hash
from flowhn_jax.config import Config
from flowhn_jax.storage import place
from flowhn_jax.utils import json_text
from flowhn_jax.utils.limits import MAX_INT
from flowhn_jax.utils.text import short_path

FILE = "training.json"


def read_budget(workdir: str) -> Budget | None:
    """Return the budget that the models in the workdir are trained for; None: no plan is there.

    Raises:
      ValueError: the file is damaged.
    """
    plan = _read(workdir)
    return None if plan is None else parse_budget(plan["budget"])


def plan_steps(
    configs: Mapping[str, Config],
    workdir: str,
    budget: Budget,
    measurements: Sequence[Measurement],
    data: str,
) -> dict[str, int]:
    """Return the steps of each model: those that the workdir records, or else new ones.

    New ones are recorded before they are returned, so that a comparison that continues later, when
    the machine may be slower or faster, trains the same steps.

    Args:
      configs: the configs of the models, by name.
      workdir: the folder of the comparison.
      budget: the budget of each training run.
      measurements: the measurements of all models, for a budget of seconds.
      data: what the models are trained on, in words.

    Raises:
      ValueError: the workdir's plan is damaged or was made for another budget, another device or
        other configs; or the budget is too large.
    """
    device = jax.devices()[0].device_kind
    plan = _read(workdir) or {"budget": str(budget), "device": device, "data": data, "models": {}}
    _check(plan, workdir, "--budget", plan["budget"], str(budget))
    _check(plan, workdir, "the training data", plan["data"], data)
    if budget.kind == "seconds":
        _check(plan, workdir, "the device", plan["device"], device)
    steps = {}
    for name, config in configs.items():
        hashed = config_hash(config)
        if name not in plan["models"]:
            of_model = [each for each in measurements if each["model"] == name]
            seconds = seconds_per_step(of_model)
            plan["models"][name] = {
                "config_hash": hashed,
                "seconds_per_step": seconds,
                "steps": steps_for(budget, config, seconds),
            }
        entry = plan["models"][name]
        _check(plan, workdir, f"the config of {name}", entry["config_hash"], hashed)
        steps[name] = entry["steps"]
    text = json.dumps(plan, indent=2) + "\n"
    path = place(workdir) / FILE
    if not path.is_file() or path.read() != text.encode():
        path.write_whole(text)
    return steps


def _check(plan: Mapping[str, Any], workdir: str, what: str, expected: str, found: str) -> None:
    """Raise ValueError if the workdir's plan was made for something else than this."""
    if found != expected:
        raise ValueError(
            f"{what} must be {expected} in {short_path(workdir)}, as when its first model was "
            f"trained; got {found}. Give another --workdir for another comparison."
        )


def _read(workdir: str) -> dict[str, Any] | None:
    """Return the plan in the workdir, if there is one.

    Raises:
      ValueError: it is damaged.
    """
    path = place(workdir) / FILE
    if not path.is_file():
        return None
    try:
        plan = json_text.loads(path.read(), repr(str(path)))
        texts = [plan["budget"], plan["device"], plan["data"]]
        texts += [each["config_hash"] for each in plan["models"].values()]
        steps = [each["steps"] for each in plan["models"].values()]
        parse_budget(plan["budget"])
        is_valid = all(isinstance(each, str) for each in texts) and all(map(_is_count, steps))
    except (ValueError, TypeError, KeyError, AttributeError):
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"{short_path(str(path))} is damaged; give another --workdir, or remove the file to "
            "plan the training again, from the speed in this workdir."
        )
    return plan


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_INT
