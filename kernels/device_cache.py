"""Measurements of devices, cached on disk: one JSON file for each kind of device.

The files are in `$FLOWHN_CACHE_DIR`, else `$XDG_CACHE_HOME/flowhn_jax`, else
`~/.cache/flowhn_jax`. They only save time: a file that cannot be read counts as empty and one that
cannot be written is skipped, both with a warning in the log. A file is replaced as a whole; of two
processes that write at the same time, one may lose its entry and measure again.
"""

import json
import logging
import os
import pathlib
import re
import tempfile
from typing import Any

_log = logging.getLogger(__name__)


def read(device_kind: str, section: str, key: str) -> Any | None:
    """Return the value written for a key of a section on this kind of device, or None.

    Args:
      device_kind: as `jax.Device.device_kind`.
      section: what kind of value it is, as 'tile'.
      key: everything that the value depends on besides the kind of device.
    """
    path = _path(device_kind)
    entries = None if path is None else _load(path).get(section)
    return entries.get(key) if isinstance(entries, dict) else None


def write(device_kind: str, section: str, key: str, value: Any) -> None:
    """Save a value that JSON can hold, replacing an earlier one."""
    path = _path(device_kind)
    if path is None:
        return
    content = _load(path)
    entries = content.get(section)
    content[section] = (entries if isinstance(entries, dict) else {}) | {key: value}
    text = json.dumps(content, indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False
        ) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        _log.warning("measurements of this device are not saved: %s", error)


def folder() -> pathlib.Path:
    """Return the folder for what this project keeps on the machine; it may not exist yet.

    Raises:
      RuntimeError: no variable names a folder, and the user has no home.
    """
    if named := os.environ.get("FLOWHN_CACHE_DIR"):
        return pathlib.Path(named)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / (
        "flowhn_jax"
    )


def _path(device_kind: str) -> pathlib.Path | None:
    try:
        return folder() / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', device_kind)}.json"
    except RuntimeError as error:
        _log.warning("measurements of this device are not saved: %s", error)
        return None


def _load(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        _log.warning("%s is not an object of sections, so it counts as empty", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("%s cannot be read, so it counts as empty: %s", path, error)
    return {}
