"""The folder of a run: which config it was begun with, and whether another one may go on in it."""

import contextlib
import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.config import Config
from flowhn_jax.parallel.distributed import broadcast_from_first, is_first
from flowhn_jax.split.plan import with_fixed_share
from flowhn_jax.utils import json_text
from flowhn_jax.utils.files import whole_file

_FILE = "config.json"
_SHOWN = 8  # parameters that a message names


def read_config(workdir: str) -> Config:
    """The config that `workdir` was begun with.

    Raises:
      FileNotFoundError: `workdir` holds no run.
      ValueError: its config.json is damaged.
    """
    return config_lib.parse(_read(workdir))


def _read(workdir: str) -> dict[str, Any]:
    path = pathlib.Path(workdir) / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"{workdir!r} holds no run: there is no {_FILE} in it.")
    try:
        return json_text.loads(path.read_bytes(), repr(str(path)))
    except ValueError:  # torn by a power cut
        kept = _kept_config(path.parent)
        if kept is None:
            raise
    if is_first():
        print(f"{str(path)!r} is damaged; its checkpoint's config is taken", file=sys.stderr)
    return kept


def _kept_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Return the config in the newest checkpoint that has one."""
    found = workdir.glob("checkpoints/*/_CHECKPOINT_METADATA")
    of_steps = [path for path in found if path.parent.name.isdecimal()]
    for path in sorted(of_steps, key=lambda path: -int(path.parent.name)):
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            config = json_text.loads(path.read_bytes(), str(path))["custom_metadata"]["config"]
            if isinstance(config, dict):
                return config
    return None


def with_recorded_share(workdir: str | None, config: Config) -> Config:
    """`config` with split.balance='time' as a share of the tokens to attention; a line tells it.

    It is the share of the trained run in `workdir`, so that the run goes on with its own model.
    With no workdir, or another kind of balance in it, it is what was measured on this device.
    """
    model = config.model
    if model.split.balance != "time":
        return config
    origin, split = "as measured", None
    if workdir is not None and (pathlib.Path(workdir) / _FILE).is_file():
        balance = read_config(workdir).model.split.balance
        if isinstance(balance, float):
            origin, split = f"as in {workdir}", dataclasses.replace(model.split, balance=balance)
    if split is None:
        split = with_fixed_share(model.split, model.dims, model.context)
    # Each host has its own measurements, but one program runs on all.
    split = dataclasses.replace(split, balance=broadcast_from_first(split.balance))
    if is_first():
        print(f"split.balance 'time', {origin}: {split.balance:.4f} of the tokens to attention")
    return dataclasses.replace(config, model=dataclasses.replace(model, split=split))


def check_model(workdir: str, config: Config) -> None:
    """Raises ValueError where `config` describes another model than the one in `workdir`.

    The dtype of matrix products may differ: parameters are float32 whatever it is.
    """
    old, new = (config_lib.to_dict(c.model) for c in (read_config(workdir), config))
    del old["dtype"], new["dtype"]
    if changes := config_lib.differences(old, new, "model."):
        there, here = (models.abstract_params(c.model) for c in (read_config(workdir), config))
        shapes = differences_of_shape(there, here)
        raise ValueError(
            f"{workdir!r} holds another model than --config: {'; '.join(changes)}"
            + (f"; so these parameters differ in shape: {shapes}. " if shapes else ". ")
            + "Give the config it was trained with, or another --workdir."
        )


def differences_of_shape(old: Any, new: Any) -> str:
    """Names of the arrays whose shapes differ between two trees, and these; '' where none do."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in leaves
        }

    before, after = shapes(old), shapes(new)
    found = [
        f"{name} {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def make(workdir: str) -> None:
    """Makes the folder; raises ValueError where it is a file."""
    path = pathlib.Path(workdir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--workdir is {workdir!r}, a file; accepted is a folder.")
    path.mkdir(parents=True, exist_ok=True)


def check(workdir: str, config: Config) -> list[str]:
    """Whether the run that has checkpoints in `workdir` may go on with `config`.

    That it goes on with the same data, wherever these are now, its batches check themselves.

    Returns:
      The changes of recipe against the run so far, as 'key: old -> new'.

    Raises:
      ValueError: the workdir holds a run of another model.
    """
    check_model(workdir, config)
    old = config_lib.to_dict(read_config(workdir))
    return config_lib.differences(old, config_lib.to_dict(config))


def write_config(workdir: str, config: Config) -> None:
    """Makes `workdir` that of `config`; where it is already, nothing is written."""
    path = pathlib.Path(workdir) / _FILE
    text = json.dumps(config_lib.to_dict(config), indent=2) + "\n"
    if not path.is_file() or path.read_bytes() != text.encode():
        with whole_file(path) as temporary:
            temporary.write_text(text)
