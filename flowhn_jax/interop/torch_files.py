"""Files that PyTorch wrote, read without running the code that a pickle can contain."""

import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flowhn_jax.utils.text import one_line


def import_torch(purpose: str, instead: str = "") -> Any:
    """Return the module torch.

    Args:
      purpose: what needs it, as the beginning of a message.
      instead: what can be done without it, as the end of a message.

    Raises:
      ImportError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{purpose} needs PyTorch: pip install torch{instead}.") from error
    return torch


def read_state_dict(path: str, instead: str = "") -> dict[str, np.ndarray]:
    """Return the arrays of a file that torch.save wrote, by name.

    Except in the format of PyTorch 1.5 and earlier, they are mapped from the file: they take memory
    only when they are used.

    Args:
      path: the path of a local file.
      instead: as in `import_torch`.

    Raises:
      ImportError: torch is not installed.
      ValueError: the file is damaged, or holds other things than a dict of dense tensors.
    """
    torch = import_torch(f"Reading {path!r}", instead)
    try:
        mapped = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and others
        raise ValueError(
            f"{path!r} must be a state dict that can be read safely. A file with a whole pickled "
            "model runs code when it is loaded, so it is refused: save model.state_dict() with "
            "torch.save and load that."
        ) from error
    if not isinstance(tensors, Mapping) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"{path!r} must hold a state dict: a dict of names and tensors.")

    def to_numpy(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # which NumPy does not have
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    try:
        return {name: to_numpy(tensor.detach()) for name, tensor in tensors.items()}
    except TypeError as error:
        raise ValueError(
            f"{path!r} must hold dense tensors of bfloat16 or a type that NumPy has: "
            f"{one_line(error)}."
        ) from error
