"""The config of `flowhn train`: a recipe, or the config of the run in the workdir.

This file is also the recipe that stands for the run in a workdir: ml_collections loads it by its
path and calls `get_config` with the workdir.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowhn_jax.commands.flags import Flags, check_path, define_recipe, load_recipe

if TYPE_CHECKING:
    import ml_collections

    from flowhn_jax.config import Config


def get_config(workdir: str) -> "ml_collections.ConfigDict":
    """Return the config of the run in `workdir`, for flags to override."""
    from flowhn_jax import config as config_lib
    from flowhn_jax.checkpoints import workdir as workdir_lib

    config = config_lib.default()
    with config.ignore_type():  # a balance of branches is a name or a number
        config.update(config_lib.to_dict(workdir_lib.read_config(workdir)))
    return config


def define(flags: Flags) -> "Callable[[], Config]":
    """Define --config and its keys; the default is the config of the run in --workdir.

    Args:
      flags: receives the definitions; has --workdir when the flags are parsed.

    Returns:
      A function that returns the validated config once the flags are parsed. With `train.init_from`
      the model is the source's, except for the keys that are flags; once the run has a checkpoint
      it is the run's own, so that the source is not needed any more. It raises ValueError if the
      config is not valid, or the source is not a model.
    """
    holder = define_recipe(
        flags, required=True, more=" Without it: the config of the run in --workdir."
    )
    flags.default_recipe = recipe_of_workdir

    def parse() -> "Config":
        from flowhn_jax import config as config_lib
        from flowhn_jax.checkpoints import workdir as workdir_lib
        from flowhn_jax.checkpoints.files import steps_of
        from flowhn_jax.interop import source

        values = load_recipe(holder).to_dict()
        if init_from := values["train"]["init_from"]:
            workdir = str(flags.values["workdir"].value)
            if steps_of(workdir):
                model = workdir_lib.read_config(workdir).model
            else:
                model = source.read_model(init_from)
            given = [name for name in flags.config_keys() if name.startswith("model.")]
            values["model"] = _with_keys(config_lib.to_dict(model), values["model"], given)
        return config_lib.parse(values)

    return parse


def recipe_of_workdir(arguments: Sequence[str]) -> str | None:
    """Return the recipe of the run in a command line's --workdir; None without --workdir.

    Raises:
      ValueError: the folder holds no run, or its config is damaged.
    """
    workdir = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--workdir", "-workdir"):
            workdir = value if equals else next(iter(arguments[i + 1 :]), None)
    if not workdir:
        return None
    check_path("workdir", workdir)
    from flowhn_jax.checkpoints import workdir as workdir_lib
    from flowhn_jax.utils.text import short_path

    try:
        workdir_lib.read_config(workdir)
    except FileNotFoundError as error:
        raise ValueError(
            "--config must be given, e.g. --config=flowhn_tiny, unless --workdir is the folder of "
            f"a run to continue; there is none in {short_path(workdir)}."
        ) from error
    return f"{__file__}:{workdir}"


def _with_keys(
    model: dict[str, Any], recipe: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Return a model's keys with those of the recipe that are named, as 'model.split.period'."""
    for name in names:
        *groups, key = name.split(".")[1:]
        target, value = model, recipe
        for group in groups:
            target, value = target[group], value[group]
        target[key] = value[key]
    return model
