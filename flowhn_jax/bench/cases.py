"""The benchmark cases: which operations at which shapes."""

import functools
from collections.abc import Callable, Iterator, Sequence

from flowhn_jax import config as config_lib
from flowhn_jax import recipes
from flowhn_jax.bench.case import (
    SSD_HEAD,
    Case,
    attention_case,
    causal_conv_case,
    cross_entropy_case,
    selective_scan_case,
    ssd_case,
)
from flowhn_jax.config import FlowHNConfig, require_flowhn

SIZES = ("small", "135m", "350m", "1b")
OPERATION_NAMES = ("selective_scan", "ssd", "attention", "cross_entropy", "causal_conv")

_SSD_STATE = 128  # Mamba-2's default (arXiv 2405.21060, section 9)


def model_config(size: str) -> FlowHNConfig:
    """Return the paper's model of a size other than 'small'."""
    model = config_lib.parse(recipes.load(f"flowhn_{size}")).model
    return require_flowhn(model, "the cases of the paper")


# The shapes at which the operations are compared with their peers on a CPU.
_SMALL = {
    "selective_scan": functools.partial(selective_scan_case, "small", 2, 512, 512, 16),
    "ssd": functools.partial(ssd_case, "small", 2, 1024, 8, 64),
}


def _paper(
    operation: str, size: str, batch: int, length: int, dtype: str, *, documents: bool = False
) -> Case:
    config = model_config(size)
    dims = config.dims
    match operation:
        case "selective_scan":
            return selective_scan_case(size, batch, length, dims.inner, dims.state, dtype)
        case "ssd":
            return ssd_case(size, batch, length, dims.inner // SSD_HEAD, _SSD_STATE, dtype)
        case "attention":
            heads = dims.heads, dims.kv_heads, dims.head_dim
            return attention_case(size, batch, length, *heads, dtype, documents=documents)
        case "cross_entropy":
            tokens = batch * length
            return cross_entropy_case(size, tokens, dims.width, config.vocab_size, dtype)
        case "causal_conv":
            return causal_conv_case(size, batch, length, dims.inner, dims.conv, dtype)
    raise ValueError(f"operation must be one of {', '.join(OPERATION_NAMES)}; got {operation!r}.")


def cases(
    operations: Sequence[str], sizes: Sequence[str], lengths: Sequence[int], tokens: int, dtype: str
) -> Iterator[Case]:
    """Yield cases of `tokens` tokens each, one at a time because each may fill the device.

    Args:
      operations: among OPERATION_NAMES.
      sizes: among SIZES; 'small' has a fixed shape.
      lengths: the lengths of the sequences; the batch is tokens / length, at least 1.
      tokens: per batch.
      dtype: the dtype of the arrays that the layers compute in it.
    """
    for make in _makers(operations, sizes, lengths, tokens, dtype):
        yield make()


def count(operations: Sequence[str], sizes: Sequence[str], lengths: Sequence[int]) -> int:
    """Return how many cases `cases` yields."""
    return sum(1 for _ in _makers(operations, sizes, lengths, 1, "float32"))


def _makers(
    operations: Sequence[str], sizes: Sequence[str], lengths: Sequence[int], tokens: int, dtype: str
) -> Iterator[Callable[[], Case]]:
    """Yield a function that makes a case, for each case."""
    for operation in operations:
        for size in sizes:
            if size == "small":
                if operation in _SMALL:
                    yield functools.partial(_SMALL[operation], dtype=dtype)
                continue
            for length in lengths:
                shape = max(1, tokens // length), length
                yield functools.partial(_paper, operation, size, *shape, dtype)
                if operation == "attention":  # documents may need another kernel or mask
                    yield functools.partial(_paper, operation, size, *shape, dtype, documents=True)
                if operation == "cross_entropy":
                    break  # it depends on the number of tokens, not on sequences
