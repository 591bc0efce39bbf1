"""The FlowHN authors' PyTorch model as a baseline: its blocks and train steps, ready to be timed.

The model is in `authors_model`. PyTorch is imported by the functions that need it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from flowhn_jax.bench import authors_model, pytorch
from flowhn_jax.config import Config, FlowHNConfig, ModelConfig, require_flowhn
from flowhn_jax.interop.reference import AUTHORS_KEYS, MODES

Run = Callable[[], Any]


def build(model: ModelConfig, mode: str) -> Any:
    """Return the model, a torch.nn.Module on the CPU: tokens [B, T] int64 -> logits [B, T, V].

    Weights are normal with standard deviation `model.init_std` and biases zero, as in Jamba.

    Args:
      model: the sizes. `model.split` is not used: the mode determines the split.
      mode: the authors' Parallel_Mode, a key of `interop.reference.MODES`.

    Raises:
      ImportError: PyTorch is not installed.
      ValueError: the authors' code has no such mode or no such model.
    """
    model = require_flowhn(model, "the authors' code")
    _check(model, mode)
    module = authors_model.modules().FlowHN(model, mode)
    _init(module, model.init_std)
    return module


def block_runs(
    model: ModelConfig, mode: str, batch: int, length: int, dtype: str
) -> tuple[Run, Run]:
    """Return (forward, both) of one block on random inputs [batch, length, D] in float32.

    The inputs are float32 for 'bfloat16' too, as the residual stream is under autocast.

    Args:
      model: see `build`.
      mode: see `build`.
      batch: number of sequences.
      length: tokens of each sequence, at least 2.
      dtype: 'float32', or 'bfloat16' for autocast over float32 parameters.

    Returns:
      forward: without gradients; returns the outputs [batch, length, D].
      both: forward and backward; returns the gradients of the inputs and of all parameters.
      Each returns when the device is done.

    Raises:
      ImportError: PyTorch is not installed.
      ValueError: see `build`, or the dtype is unknown.
    """
    import torch

    model = require_flowhn(model, "the authors' code")
    _check(model, mode)
    pytorch.autocast(dtype)  # raises for an unknown dtype
    block = authors_model.modules().Block(model, mode, index=0)
    _init(block, model.init_std)
    device = pytorch.device()
    block.to(device)
    generator = torch.Generator(device).manual_seed(0)
    x, cotangent = torch.randn(
        2, batch, length, model.width, generator=generator, device=device
    ).unbind()
    differentiated = [x.requires_grad_(), *block.parameters()]

    def run() -> Any:
        with pytorch.autocast(dtype):
            return block(x)

    def forward() -> Any:
        with torch.no_grad():
            y = run()
        pytorch.wait()
        return y

    def both() -> Any:
        gradients = torch.autograd.grad(run(), differentiated, cotangent)
        pytorch.wait()
        return gradients

    return forward, both


def train_step(config: Config, mode: str) -> pytorch.Step:
    """Return an update of the whole model on the tokens of `bench.throughput.random_batch`.

    `config.model.dtype` 'auto' is bfloat16 under autocast on a GPU and float32 on a CPU.

    Raises:
      ImportError: PyTorch is not installed.
      ValueError: see `build`.
    """
    model, dtype = build(config.model, mode), config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if pytorch.device() == "cuda" else "float32"
    shape = config.train.batch_size, config.model.context + 1
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return pytorch.make_step(model, model, config.train, tokens, dtype=dtype)


def _check(model: FlowHNConfig, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}.")
    for key, needed in {**AUTHORS_KEYS, "tie_embeddings": False}.items():
        value = getattr(model, key)
        if value != needed:
            raise ValueError(
                f"model.{key} must be {needed!r}, as in the authors' code; got {value!r}."
            )


def _init(module: Any, std: float) -> None:
    """Initialize a module's linear, convolution and embedding layers in place, as Jamba does."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for child in module.modules():
        if isinstance(child, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Embedding):
            torch.nn.init.normal_(child.weight, std=std, generator=generator)
            if isinstance(bias := getattr(child, "bias", None), torch.Tensor):
                torch.nn.init.zeros_(bias)
