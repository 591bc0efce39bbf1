"""What all models share: embedding, blocks, final norm and an untied head."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.config import ModelConfig
from flowhn_jax.layers.decoder import compute_dtype
from flowhn_jax.layers.embedding import Embedding
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.prompts import Prompts
from kernels.partition import constrain

STREAM = "B stream D"
# From the embedding's layout to the stream's: XLA finds no way of its own, and gathers x whole.
_FROM_EMBEDDING = "row column shard", "row stream part", STREAM

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def checkpointed(block: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """A block whose backward pass keeps what `remat` says; see `LanguageModel.__call__`."""
    if remat == "none":
        return block
    return jax.checkpoint(lambda *args: block(*args), policy=_REMAT_POLICIES[remat])


class DecodeCache(NamedTuple):
    """What a model keeps of the tokens so far.

    Attributes:
      blocks: each block's own.
      tokens: [B] int32, how many there were: the position of the next one.
    """

    blocks: list[Any]
    tokens: jax.Array


class LanguageModel(nnx.Module):
    """A stack of blocks, which a model makes in `block`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.config = config
        self.embed = Embedding(
            config.vocab_size, config.width, init_std=config.init_std, dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List([self.block(index, rngs) for index in range(config.blocks)])
        self.final_norm = rms_norm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head = linear(
            config.width, config.vocab_size, init_std=config.init_std, dtype=dtype, rngs=rngs
        )

    def block(self, index: int, rngs: nnx.Rngs) -> nnx.Module:
        """Block `index`, from [B, T, D] and segment_ids [B, T] to [B, T, D]."""
        raise NotImplementedError

    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, remat: str = "none"
    ) -> jax.Array:
        """Final hidden states, ready for the head.

        Args:
          tokens: [B, T] int32.
          segment_ids: [B, T] int32, documents of a packed sequence; None: one document.
          remat: what the backward pass keeps: 'none' recomputes nothing, 'dots' keeps the results
            of matrix products, 'full' only the blocks' inputs.

        Returns:
          [B, T, D] in the compute dtype.
        """
        x = self.embedded(constrain(tokens, "row column"))
        for layout in _FROM_EMBEDDING:
            x = constrain(x, layout)
        return self.normed(self.apply_blocks(x, segment_ids, remat))

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] -> [..., D]."""
        return self.embed(tokens)

    def normed(self, x: jax.Array) -> jax.Array:
        """x [..., D] behind the blocks -> what the head takes."""
        return self.final_norm(x)

    def apply_blocks(self, x: jax.Array, segment_ids: jax.Array | None, remat: str) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        for block in self.blocks:
            x = constrain(checkpointed(block, remat)(x, segment_ids), STREAM)
        return x

    def init_cache(self, batch: int, length: int) -> DecodeCache:
        """The cache before the first of `length` tokens."""
        return DecodeCache(self.init_blocks(batch, length), jnp.zeros(batch, jnp.int32))

    def init_blocks(self, batch: int, length: int) -> list[Any]:
        """The blocks' caches before the first of `length` tokens."""
        return [block.init_cache(batch, length) for block in self.blocks]

    def prefill(
        self, tokens: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, DecodeCache]:
        """Reads prompts, tokens [B, T] with padding behind each.

        Returns:
          (what the head takes of each row's last token [B, D], the cache behind it, with room for
          `length` tokens in all).
        """
        x, caches = self.fill(self.embedded(tokens), prompts, length)
        return self.normed(prompts.last(x)), DecodeCache(caches, prompts.lengths)

    def fill(self, x: jax.Array, prompts: Prompts, length: int) -> tuple[jax.Array, list[Any]]:
        """x [B, T, D] -> ([B, T, D], the blocks' caches behind each row's tokens)."""
        caches = []
        for block in self.blocks:
            x, cache = block.prefill(x, prompts, length)
            x = constrain(x, STREAM)
            caches.append(cache)
        return x, caches

    def step(self, tokens: jax.Array, cache: DecodeCache) -> tuple[jax.Array, DecodeCache]:
        """One token of each sequence: tokens [B] -> (what the head takes [B, D], the cache)."""
        x, caches = self.advance(self.embedded(tokens), *cache)
        return self.normed(x), DecodeCache(caches, cache.tokens + 1)

    def advance(
        self, x: jax.Array, caches: list[Any], positions: jax.Array
    ) -> tuple[jax.Array, list[Any]]:
        """x [B, D] at `positions` [B] through the blocks -> ([B, D], the caches behind it)."""
        del positions
        behind = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.step(x, cache)
            behind.append(cache)
        return x, behind

    def parts(self, length: int) -> Iterator[tuple[nnx.Module, int]]:
        """All that costs FLOPs, with the tokens that it gets of a sequence of `length`."""
        for block in self.blocks:
            yield block, length
        yield self.head, length
