"""The base class of all models: embedding, blocks, final norm and head."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.embedding import Embedding
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.base import ModelConfig
from kernels.custom_vjp import KERNEL_RESULT
from kernels.partition import constrain

STREAM = "B stream D"
# Steps from the embedding's layout to the stream's: in a single step XLA would all-gather x.
_FROM_EMBEDDING = "row column shard", "row stream part", STREAM

_KEPT = (
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(KERNEL_RESULT),
)


def _keep_results(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Return whether to keep a primitive's result: of a matrix product or of a fused kernel.

    `jax.nn` does not name the results of cuDNN's attention.
    """
    is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return is_cudnn or any(policy(primitive, *arguments, **parameters) for policy in _KEPT)


_REMAT_POLICIES = {
    "dots": _keep_results,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class DecodeCache(NamedTuple):
    """The state of decoding after the tokens so far.

    Attributes:
      blocks: the cache of each block.
      tokens: [B] int32, tokens so far: the position of the next one.
    """

    blocks: list[Any]
    tokens: jax.Array


class FlopPart(NamedTuple):
    """A module that costs FLOPs.

    Attributes:
      module: a layer or a block, with all modules in it.
      tokens: the number of a sequence's tokens that pass it.
      read: tokens that its `SelectiveMixer` reads; None: `tokens`.
    """

    module: nnx.Module
    tokens: int
    read: int | None = None


class LanguageModel(nnx.Module):
    """A stack of blocks, which each family makes in `make_block`.

    With `config.tie_embeddings` the table of `embed` is the head's matrix as well, and `head` is
    None. The initial values of the embedding and of the blocks are those of the untied model: the
    table is normal with the standard deviation `config.init_std`, as in transformers, where a head
    takes the values of the table that it is tied to.
    """

    blocks: nnx.List[Any]

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        context = LayerContext(rngs, config.compute_dtype, config.init_std, config.norm_eps)
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width, context)
        self.blocks = nnx.List([self.make_block(index, context) for index in range(config.blocks)])
        self.final_norm = rms_norm(config.width, context)
        # Made last, so that tied and untied models draw the same values for everything else.
        is_tied = config.tie_embeddings
        self.head = None if is_tied else linear(config.width, config.vocab_size, context)

    @property
    def output_layer(self) -> nnx.LinearGeneral | Embedding:
        """The layer whose matrix multiplies the final hidden states: the embedding if tied."""
        return self.embed if self.head is None else self.head

    def head_kernel(self) -> jax.Array:
        """Return the head's matrix [D, V]; if tied, a view of the embedding's table.

        The gradient of the table is then the sum of both uses, in float32. The table [V, D] is
        sharded as the head's matrix is, V over `tensor` and D over `fsdp` and `sequence`
        (`parallel.rules`), so that neither use moves it.
        """
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def make_block(self, index: int, context: LayerContext) -> nnx.Module:
        """Return block `index`, a `DecoderLayer` unless the family overrides how blocks are run."""
        raise NotImplementedError

    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, remat: str = "none"
    ) -> jax.Array:
        """Return the final hidden states [B, T, D], which the head takes, in the compute dtype.

        Args:
          tokens: [B, T] int32.
          segment_ids: [B, T] int32, documents of packed sequences; None: one document per row.
          remat: what is saved for the backward pass, which recomputes the rest: 'none' saves
            everything, 'dots' the results of matrix products and of fused kernels, 'full' only the
            blocks' inputs.
        """
        x = self.embed_stream(tokens)
        options = self.block_options(x.shape[1])
        for block, each in zip(self.checkpointed_blocks(remat), options, strict=True):
            x = constrain(block(x, segment_ids, **each), STREAM)
        return self.normalize(x)

    def embed_stream(self, tokens: jax.Array) -> jax.Array:
        """Return the embedded tokens [B, T, D] of tokens [B, T], laid out as the stream is."""
        x = self.embed_tokens(constrain(tokens, "row column"))
        for layout in _FROM_EMBEDDING:
            x = constrain(x, layout)
        return x

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Return the embedded tokens [..., D] of tokens [...]."""
        return self.embed(tokens)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Return the head's input [..., D] for the stream x [..., D] after the blocks."""
        return self.final_norm(x)

    def block_options(self, length: int) -> list[dict[str, Any]]:
        """Return further keyword arguments of each block's call, for sequences of `length`."""
        del length
        return [{} for _ in self.blocks]

    def checkpointed_blocks(self, remat: str) -> list[Callable[..., Any]]:
        """Return the blocks, wrapped for rematerialization as `remat` of `__call__` says.

        Pass arrays to them by position and everything else by keyword.
        """
        return [_checkpointed(block, remat) for block in self.blocks]

    def init_cache(self, batch: int, length: int) -> DecodeCache:
        """Return the cache of `batch` sequences without tokens, with room for `length` each."""
        return DecodeCache(self.init_block_caches(batch, length), jnp.zeros(batch, jnp.int32))

    def init_block_caches(self, batch: int, length: int) -> list[Any]:
        """Return the blocks' caches of sequences without tokens, with room for `length` each."""
        return [block.init_cache(batch, length) for block in self.blocks]

    def prefill(
        self, tokens: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, DecodeCache]:
        """Return the head's input [B, D] for each row's last token, and the resulting cache.

        Args:
          tokens: [B, T] int32, rows with padding after their real tokens.
          prompts: lengths and documents of the rows.
          length: tokens per sequence that the cache must have room for, the prompt's included.
        """
        x, caches = self.prefill_blocks(self.embed_tokens(tokens), prompts, length)
        return self.normalize(prompts.last(x)), DecodeCache(caches, prompts.lengths)

    def prefill_blocks(
        self, x: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, list[Any]]:
        """Return the stream [B, T, D] and the blocks' caches after each row's tokens."""
        caches = []
        for block in self.blocks:
            x, cache = block.prefill(x, prompts, length)
            x = constrain(x, STREAM)
            caches.append(cache)
        return x, caches

    def step(self, tokens: jax.Array, cache: DecodeCache) -> tuple[jax.Array, DecodeCache]:
        """Return the head's input [B, D] for tokens [B], one per sequence, and the new cache."""
        x, new_caches = self.decode_blocks(self.embed_tokens(tokens), *cache)
        return self.normalize(x), DecodeCache(new_caches, cache.tokens + 1)

    def decode_blocks(
        self, x: jax.Array, caches: list[Any], positions: jax.Array
    ) -> tuple[jax.Array, list[Any]]:
        """Return the stream [B, D] of tokens at `positions` [B], and the resulting caches."""
        del positions
        new_caches = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, new_cache = block.step(x, cache)
            new_caches.append(new_cache)
        return x, new_caches

    def flop_parts(self, length: int) -> Iterator[FlopPart]:
        """Yield each module that costs FLOPs, and how many tokens of `length` it processes."""
        for block in self.blocks:
            yield FlopPart(block, length)
        yield FlopPart(self.output_layer, length)


def _checkpointed(block: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Return the block, rematerialized as `remat` says; its keyword arguments are static."""
    if remat == "none":
        return block
    policy = _REMAT_POLICIES[remat]

    def run(*arrays: Any, **static: Any) -> Any:
        return jax.checkpoint(partial(block, **static), policy=policy)(*arrays)

    return run
