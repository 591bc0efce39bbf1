"""A run of a few milliseconds per step, and its data, for tools that test the training loop."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from flowhn_jax import config as config_lib
from flowhn_jax.config import Config
from flowhn_jax.data.prepare import prepare
from flowhn_jax.utils.sources import ROOT

CONTEXT = 24


def small_keys(data: str | os.PathLike, **train: Any) -> dict[str, dict[str, Any]]:
    """Return config keys for a small run on the prepared set `data`, with `train` overrides."""
    return {
        "model": {
            "vocab_size": 257,
            "context": CONTEXT,
            "width": 16,
            "mlp_width": 24,
            "blocks": 3,
            "heads": 4,
            "kv_heads": 2,
            "ssm_state": 4,
            "dtype": "float32",
            "split": {"align": 1, "period": 7},
        },
        "train": {"batch_size": 8, "eval_windows": 8, "keep_checkpoints": 2, **train},
        "data": {"path": str(data)},
        "mesh": {"data": 1},
    }


def small_config(data: str | os.PathLike, **train: Any) -> Config:
    """Return `small_keys` as a parsed config."""
    return config_lib.parse(small_keys(data, **train))


def as_flags(keys: Mapping[str, Any], prefix: str = "config.") -> Iterator[str]:
    """Yield config keys as flags of train.py."""
    for name, value in keys.items():
        if isinstance(value, Mapping):
            yield from as_flags(value, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}={value}"


def prepare_text(folder: str | os.PathLike, context: int = CONTEXT) -> pathlib.Path:
    """Return the prepared set in `folder`, made from the sources of flowhn_jax/data if absent."""
    folder = pathlib.Path(folder)
    text = folder / "text.txt"
    if not text.is_file():
        sources = sorted((ROOT / "flowhn_jax" / "data").glob("*.py"))
        text.write_text("\n".join(path.read_text() for path in sources))
    prepare(str(text), "bytes", folder / "set", context=context)
    return folder / "set"
