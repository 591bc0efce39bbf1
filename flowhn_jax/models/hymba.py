"""Hymba (arXiv 2411.13676): attention and Mamba heads in parallel on the same tokens of a layer.

Both give E channels, which are normed and averaged with learned scales before one output projection
(equation 4). Learned meta tokens stand before every sequence (section 2.4). Attention has a window
except in the first, middle and last layer, and two consecutive layers with windows share keys and
values (section 2.3). In a packed sequence the meta tokens stand once, and every document starts
after them: from their state and inputs, and at the same distance from their keys.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.attention import Attention, KeysValues, KVCache
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.mamba1 import Mamba1, Mamba1Cache
from flowhn_jax.layers.mlp import SwiGLU
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.base import Mamba1Keys, RotaryKeys
from flowhn_jax.models.language_model import STREAM, FlopPart, LanguageModel
from flowhn_jax.models.registry import register
from flowhn_jax.utils.checks import require_divisor, require_positive
from kernels.partition import constrain


@dataclasses.dataclass(frozen=True)
class HymbaConfig(Mamba1Keys, RotaryKeys):
    """What Hymba reads: the keys of rotary attention and of Mamba-1, meta tokens and windows.

    The heads of attention share the mixer's channels: their size is E / model.heads.

    Attributes:
      meta_tokens: learned tokens before every sequence.
      window: positions that a token attends to, its own included, except in the first, middle and
        last layer, whose attention is global.
    """

    kind: ClassVar[str] = "hymba"

    meta_tokens: int = 128
    window: int = 1024

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "model", "meta_tokens", "window")
        inner = "model.ssm_expand * model.width"
        require_divisor(self.inner, inner, "model.heads", self.heads)

    @property
    def head_size(self) -> int:
        """K, the size of an attention head."""
        return self.inner // self.heads

    @property
    def prefix_tokens(self) -> int:
        """The number of learned tokens before every sequence."""
        return self.meta_tokens


def is_global(index: int, layers: int) -> bool:
    """Return whether attention of layer `index` has no window."""
    return index in (0, layers // 2, layers - 1)


def borrows(index: int, layers: int) -> bool:
    """Return whether layer `index` takes the keys and values of the layer before it."""
    windowed_before = 0
    while windowed_before < index and not is_global(index - windowed_before - 1, layers):
        windowed_before += 1
    return not is_global(index, layers) and windowed_before % 2 == 1


class HymbaCache(NamedTuple):
    """The caches of a layer; `attention` is None where it borrows keys and values."""

    attention: KVCache | None
    ssm: Mamba1Cache


class HybridHeads(nnx.Module):
    """The mean of the normed outputs of attention and Mamba heads, E channels each, projected.

    In addition to the arguments of a `Mixer`, its methods take keys and values from another layer.
    """

    def __init__(self, config: HymbaConfig, index: int, context: LayerContext):
        layers, inner = config.blocks, config.inner
        self.attention = Attention(
            config.attention_sizes,
            context,
            rope_theta=config.rope_theta,
            window=None if is_global(index, layers) else config.window,
            prefix=config.meta_tokens,
            borrows=borrows(index, layers),
            projects=False,
        )
        self.ssm = Mamba1(config.mamba1_sizes, context, projects=False, prefix=config.meta_tokens)
        self.attention_norm = rms_norm(inner, context)
        self.ssm_norm = rms_norm(inner, context)
        self.out_proj = linear(inner, config.width, context)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, keys_values: KeysValues | None
    ) -> tuple[jax.Array, KeysValues]:
        """Return the mixed tokens [B, T, D], and keys and values: the layer's or the borrowed."""
        if keys_values is None or not self.attention.borrows:
            keys_values = self.attention.keys_values(x, segment_ids)
        attended = self.attention(x, segment_ids, keys_values)
        return self._fuse(attended, self.ssm(x, segment_ids)), keys_values

    def prefill(
        self, x: jax.Array, prompts: Prompts, length: int, keys_values: KeysValues | None
    ) -> tuple[jax.Array, HymbaCache, KeysValues]:
        """Return the mixed tokens [B, T, D], the cache after each row, and keys and values."""
        own = None
        if keys_values is None or not self.attention.borrows:
            keys_values = self.attention.keys_values(x, prompts.segment_ids)
            own = self.attention.fill_cache(keys_values, prompts, length)
        attended = self.attention(x, prompts.segment_ids, keys_values)
        ssm, of_ssm = self.ssm.prefill(x, prompts, length)
        return self._fuse(attended, ssm), HymbaCache(own, of_ssm), keys_values

    def step(
        self, x: jax.Array, cache: HymbaCache, borrowed: KVCache | None
    ) -> tuple[jax.Array, HymbaCache, KVCache]:
        """Return the mixed token [B, D] of each sequence, the resulting cache, and the KV cache.

        Args:
          x: [B, D].
          cache: the cache of this layer.
          borrowed: the KV cache of the layer before, which this one takes if it borrows.
        """
        own = None if cache.attention is None else self.attention.extend(x, cache.attention)
        visible = borrowed if own is None else own
        assert visible is not None, "the first layer never borrows"
        ssm, of_ssm = self.ssm.step(x, cache.ssm)
        mixed = self._fuse(self.attention.attend_last(x, visible), ssm)
        return mixed, HymbaCache(own, of_ssm), visible

    def _fuse(self, attended: jax.Array, ssm: jax.Array) -> jax.Array:
        return self.out_proj((self.attention_norm(attended) + self.ssm_norm(ssm)) / 2)


class HymbaLayer(nnx.Module):
    """x + mixer(RMS(x)), then x + SwiGLU(RMS(x)); keys and values pass from layer to layer."""

    def __init__(self, config: HymbaConfig, index: int, context: LayerContext):
        self.mixer = HybridHeads(config, index, context)
        self.norm = rms_norm(config.width, context)
        self.mlp_norm = rms_norm(config.width, context)
        self.mlp = SwiGLU(config.width, config.mlp_width, context)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, keys_values: KeysValues | None
    ) -> tuple[jax.Array, KeysValues]:
        """Return the stream [B, T, D], and keys and values for the next layer."""
        mixed, keys_values = self.mixer(self.norm(x), segment_ids, keys_values)
        return constrain(self._add_mlp(x + mixed), STREAM), keys_values

    def prefill(
        self, x: jax.Array, prompts: Prompts, length: int, keys_values: KeysValues | None
    ) -> tuple[jax.Array, HymbaCache, KeysValues]:
        """Return the stream [B, T, D], the cache after each row, and keys and values."""
        mixed, cache, keys_values = self.mixer.prefill(self.norm(x), prompts, length, keys_values)
        return constrain(self._add_mlp(x + mixed), STREAM), cache, keys_values

    def step(
        self, x: jax.Array, cache: HymbaCache, borrowed: KVCache | None
    ) -> tuple[jax.Array, HymbaCache, KVCache]:
        """Return the stream [B, D], the resulting cache, and the KV cache for the next layer."""
        mixed, new_cache, visible = self.mixer.step(self.norm(x), cache, borrowed)
        return self._add_mlp(x + mixed), new_cache, visible

    def _add_mlp(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.mlp_norm(x))


@register(HymbaConfig)
class Hymba(LanguageModel):
    """A stack of hybrid-head layers after learned meta tokens."""

    config: HymbaConfig

    def __init__(self, config: HymbaConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        shape = config.meta_tokens, config.width
        self.meta = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape))

    def make_block(self, index: int, context: LayerContext) -> HymbaLayer:
        """Return layer `index`, by its place among those with windows."""
        return HymbaLayer(self.config, index, context)

    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, remat: str = "none"
    ) -> jax.Array:
        """Return the final hidden states [B, T, D], without those of the meta tokens."""
        count = self.config.meta_tokens
        x = self._prepend_meta(self.embed_stream(tokens))
        if segment_ids is not None:
            segment_ids = _with_meta(segment_ids, count)
        keys_values = None
        for block in self.checkpointed_blocks(remat):
            x, keys_values = block(x, segment_ids, keys_values)
        return self.normalize(x[:, count:])

    def init_block_caches(self, batch: int, length: int) -> list[HymbaCache]:
        """Return the blocks' caches after the meta tokens, before the first of `length` tokens."""
        nothing = jnp.zeros((batch, 0, self.config.width), self.config.compute_dtype)
        none = jnp.zeros(batch, jnp.int32)
        return self.prefill_blocks(nothing, Prompts(none, none, None), length)[1]

    def prefill_blocks(
        self, x: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, list[HymbaCache]]:
        """Return the stream [B, T, D] and the blocks' caches after each row's tokens."""
        count = self.config.meta_tokens
        x = self._prepend_meta(x)
        ids = prompts.segment_ids
        prompts = Prompts(
            prompts.lengths + count,
            jnp.where(prompts.first > 0, prompts.first + count, 0),
            None if ids is None else _with_meta(ids, count),
        )
        caches, keys_values = [], None
        for block in self.blocks:
            x, cache, keys_values = block.prefill(x, prompts, count + length, keys_values)
            caches.append(cache)
        return x[:, count:], caches

    def decode_blocks(
        self, x: jax.Array, caches: list[HymbaCache], positions: jax.Array
    ) -> tuple[jax.Array, list[HymbaCache]]:
        """Return the stream [B, D] of tokens at `positions` [B], and the resulting caches."""
        del positions
        new_caches, visible = [], None
        for block, cache in zip(self.blocks, caches, strict=True):
            x, new_cache, visible = block.step(x, cache, visible)
            new_caches.append(new_cache)
        return x, new_caches

    def _prepend_meta(self, x: jax.Array) -> jax.Array:
        meta = jnp.broadcast_to(self.meta[...], (x.shape[0], *self.meta.shape))
        return jnp.concatenate((meta.astype(x.dtype), x), axis=1)

    def flop_parts(self, length: int) -> Iterator[FlopPart]:
        """Yield each module that costs FLOPs, and how many tokens of `length` it processes."""
        for block in self.blocks:
            yield FlopPart(block, self.config.meta_tokens + length)
        yield FlopPart(self.output_layer, length)


def _with_meta(segment_ids: jax.Array, count: int) -> jax.Array:
    """Return segment_ids [B, T] as [B, count + T]; the meta tokens are of the first document."""
    return jnp.pad(segment_ids, ((0, 0), (count, 0)), mode="edge")
