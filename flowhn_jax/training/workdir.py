"""The folder of a run: which config it was begun with, and whether another one may go on in it."""

import json
import os
import pathlib
from typing import Any

from flowhn_jax import config as config_lib
from flowhn_jax.config import Config

_FILE = "config.json"


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
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}.") from error


def check_model(workdir: str, config: Config) -> None:
    """Raises ValueError where `config` describes another model than the one in `workdir`."""
    old = config_lib.to_dict(read_config(workdir))["model"]
    changes = config_lib.differences(old, config_lib.to_dict(config)["model"], "model.")
    if changes:
        raise ValueError(
            f"{workdir!r} holds another model than --config: {'; '.join(changes)}. "
            "Give the config it was trained with, or another --workdir."
        )


def claim(workdir: str, config: Config) -> list[str]:
    """Makes `workdir` that of `config`, writing config.json.

    Returns:
      The changes of recipe against the run so far, as 'key: old -> new'.

    Raises:
      ValueError: the workdir holds a run of another model or on other data.
    """
    new = config_lib.to_dict(config)
    path = pathlib.Path(workdir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--workdir is {workdir!r}, a file; accepted is a folder.")
    path.mkdir(parents=True, exist_ok=True)
    changes = []
    if (path / _FILE).is_file():
        check_model(workdir, config)
        old = config_lib.to_dict(read_config(workdir))
        data_changes = config_lib.differences(old["data"], new["data"], "data.")
        if data_changes:
            raise ValueError(
                f"{workdir!r} was begun on other data: {'; '.join(data_changes)}. "
                "Give its own data again, or another --workdir."
            )
        changes = config_lib.differences(old, new)
    temporary = path / f"{_FILE}.tmp"
    temporary.write_text(json.dumps(new, indent=2) + "\n")
    os.replace(temporary, path / _FILE)
    return changes
