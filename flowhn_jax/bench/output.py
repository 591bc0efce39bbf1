"""The JSON file that a benchmark writes: checked first, written when everything is measured."""

import json
import os
from typing import Any

import jax

from flowhn_jax.storage import is_remote, place
from flowhn_jax.utils.text import one_line, short_path


def check_out(path: str) -> None:
    """Check that results can be written to `path`, before minutes are spent on measuring them.

    Raises:
      ValueError: the folder does not exist, or the file cannot be written.
    """
    if is_remote(path):
        _check_bucket(path)
        return
    is_new = not os.path.lexists(path)
    try:
        # Not blocking: a pipe without a reader is refused, not waited for.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666))
        if is_new:
            os.remove(path)
    except OSError as error:
        raise ValueError(
            f"--out must be a file that can be written, in a folder that exists; "
            f"got {short_path(path)}: {error.strerror}."
        ) from error


def _check_bucket(path: str) -> None:
    """Raise ValueError if the bucket of `path` does not answer, or the name is a folder's."""
    try:
        is_folder = place(path).is_dir()
    except OSError as error:
        raise ValueError(f"--out must be in a bucket that answers: {one_line(error)}.") from error
    if is_folder:
        raise ValueError(f"--out must be a file; got {short_path(path)}, a folder.")


def write_results(path: str, results: dict[str, Any]) -> dict[str, Any]:
    """Write results with the device and the version of JAX, print the path, and return them."""
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__} | results
    save_results(path, results)
    print(f"wrote {path}")
    return results


def save_results(path: str, results: dict[str, Any]) -> None:
    """Write results as JSON."""
    place(path).write(json.dumps(results, indent=1))
