"""What the benchmarks of PyTorch code share: device, precision and a training step."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from flowhn_jax.config import TrainConfig

Step = Callable[[], float]  # one update; returns its loss

_MATRICES = ("proj.weight", "lm_head.weight", "tokens.weight", "embeddings.weight")


@functools.cache
def device() -> str:
    """Return 'cuda' if PyTorch has a GPU, else 'cpu'."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Wait until the GPU, if there is one, has finished all queued work."""
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()


def autocast(dtype: str) -> AbstractContextManager[Any]:
    """Return a context whose matrix products are 'bfloat16' over float32 parameters, or 'float32'.

    Raises:
      ValueError: `dtype` is neither.
    """
    import torch

    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype must be 'bfloat16' or 'float32'; got {dtype!r}.")
    return torch.autocast(device(), torch.bfloat16, enabled=dtype == "bfloat16")


def make_step(
    model: Any,
    logits: Callable[[Any], Any],
    train: TrainConfig,
    tokens: np.ndarray,
    *,
    dtype: str = "float32",
) -> Step:
    """Return an update of a model on one batch: cross-entropy, clipping and fused AdamW.

    The learning rate is constant; weight decay is on matrices only.

    Args:
      model: the torch.nn.Module. It moves to `device()`.
      logits: (tokens [B, T] int64) -> logits [B, T, V] of `model`.
      train: the optimizer's settings; its schedule is not used.
      tokens: [B, T + 1] integers, inputs and targets.
      dtype: 'float32' or 'bfloat16', see `autocast`.
    """
    import torch

    model.to(device()).train()
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.endswith(_MATRICES)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        weight_decay=train.weight_decay,
        fused=True,
    )
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64)).to(device())
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64)).to(device())

    def step() -> float:
        with autocast(dtype):
            found = logits(inputs).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(found, targets.flatten())
        loss.backward()
        if train.clip_norm:  # 0: no clipping
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
