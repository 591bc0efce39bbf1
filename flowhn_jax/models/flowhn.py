"""FlowHN (arXiv 2505.19472): parallel hybrid blocks whose branches share the tokens."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.attention import Attention, KVCache
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.mamba1 import Mamba1, Mamba1Cache
from flowhn_jax.layers.mamba2 import Mamba2, Mamba2Cache
from flowhn_jax.layers.mixer import CacheT
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.base import HeadDimKeys, Mamba1Keys, Mamba2Keys, ModelConfig
from flowhn_jax.models.language_model import STREAM, Blocks, LanguageModel
from flowhn_jax.models.registry import register
from flowhn_jax.parallel.branch import Part, is_parallel, side_by_side
from flowhn_jax.split import (
    BlockPlan,
    BranchDims,
    Plan,
    Selection,
    SplitConfig,
    contains,
    count,
    is_bounded,
    make_plan,
    merge,
    take,
)
from flowhn_jax.split.plan import EVERYTHING, partition_warning
from flowhn_jax.utils.checks import require
from kernels.partition import constrain

SSMS = ("mamba1", "mamba2")


@dataclasses.dataclass(frozen=True)
class FlowHNConfig(Mamba2Keys, Mamba1Keys, HeadDimKeys):
    """What FlowHN reads: the keys of both branches, and the split; defaults are the paper's 135M.

    Inherited keys: those of every model (`ModelConfig`); mlp_width, heads, kv_heads and head_dim of
    attention; ssm_state, ssm_conv, ssm_expand, ssm_dt_rank, ssm_head_dim and ssm_groups of the SSM.

    Attributes:
      ssm: mixer of the SSM branch, 'mamba1' or 'mamba2'.
      branch_mlp: an MLP after each branch's mixer; False: none, as in the paper's figure.
      split: which tokens go to which branch.
    """

    kind: ClassVar[str] = "flowhn"
    has_branches: ClassVar[bool] = True

    ssm: str = "mamba1"
    branch_mlp: bool = True
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)

    def __post_init__(self):
        require(self.ssm in SSMS, "model.ssm", f"one of {', '.join(SSMS)}", self.ssm)
        super().__post_init__()
        stem, most = self.split.stem, f"0 to model.blocks ({self.blocks})"
        require(stem <= self.blocks, "model.split.stem", most, stem)

    @property
    def name(self) -> str:
        """The split strategy, which tells FlowHN's variants apart."""
        return self.split.strategy

    @property
    def is_mamba2(self) -> bool:
        """Whether the SSM branch is Mamba-2."""
        return self.ssm == "mamba2"

    @property
    def dims(self) -> BranchDims:
        """The sizes of both branches, by which the split is balanced."""
        return BranchDims(
            width=self.width,
            mlp_width=self.branch_mlp_width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_size,
            inner=self.inner,
            state=self.ssm_state,
            conv=self.ssm_conv,
            dt_rank=0 if self.is_mamba2 else self.dt_rank,
            ssm_heads=self.ssm_heads if self.is_mamba2 else 0,
            ssm_groups=self.ssm_groups if self.is_mamba2 else 0,
        )

    @property
    def branch_mlp_width(self) -> int:
        """Hidden units of a branch's MLP, 0 without one."""
        return self.mlp_width if self.branch_mlp else 0

    @property
    def max_length(self) -> int | None:
        """The context where the strategy gives later positions to no branch; None: no limit."""
        return self.context if is_bounded(self.split, self.blocks) else None

    @property
    def can_decode(self) -> bool:
        """Whether the plan of a sequence stays the same when it grows by a token."""
        return self.split.scope == "context"

    def plan(self, length: int | None = None) -> Plan:
        """Return the split of `length` tokens; None: of the whole context.

        Raises:
          ValueError: `make_plan` raises it.
        """
        return make_plan(
            self.split, self.dims, blocks=self.blocks, context=self.context, length=length
        )

    def block_plans(self, length: int) -> tuple[BlockPlan, ...]:
        """Return which positions of `length` the branches of each block get."""
        return self.plan(length).blocks

    def warning(self) -> str | None:
        """Return a warning where the plan makes two models that never exchange tokens."""
        return partition_warning(self.split, self.plan())

    def _check_positions(self, sequence: int) -> None:
        for block in self.plan().blocks:
            for branch, selection in (("attention", block.attention), ("the SSM", block.ssm)):
                tokens = selection.count(self.context)
                if tokens % sequence:
                    raise ValueError(
                        f"mesh.sequence must divide the {tokens} tokens of {branch} in a context "
                        f"of {self.context}; got {sequence}. Give a divisor, or another "
                        "model.split.align or model.split.period."
                    )


def require_flowhn(model: ModelConfig, command: str) -> FlowHNConfig:
    """Return `model` as the FlowHN config that a command needs.

    Raises:
      ValueError: it is a baseline, which has neither branches nor a split.
    """
    if not isinstance(model, FlowHNConfig):
        raise ValueError(f"model.kind must be 'flowhn' for {command}; got {model.kind!r}.")
    return model


class BlockCache(NamedTuple):
    """The caches of both branches, each of the tokens that it got."""

    ssm: Mamba1Cache | Mamba2Cache
    attention: KVCache


class Block(nnx.Module):
    """An SSM branch and an attention branch in parallel, and the fusion of their outputs."""

    def __init__(self, config: FlowHNConfig, is_split: bool, context: LayerContext):
        width, mlp_width = config.width, config.branch_mlp_width
        # Both mixers draw their parameters before the rest of the branches does.
        if config.is_mamba2:
            ssm = Mamba2(config.mamba2_sizes, context)
        else:
            ssm = Mamba1(config.mamba1_sizes, context)
        attention = Attention(config.attention_sizes, context)
        self.ssm: DecoderLayer[Any] = DecoderLayer(ssm, width, mlp_width, context)
        self.attention: DecoderLayer[KVCache] = DecoderLayer(attention, width, mlp_width, context)
        self.branch_proj = linear(width if is_split else 2 * width, width, context)
        self.norm = rms_norm(width, context)
        self.final_proj = linear(width, width, context)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None = None, *, plan: BlockPlan
    ) -> jax.Array:
        """Return the stream [B, T, D] after the block.

        Args:
          x: [B, T, D].
          segment_ids: [B, T] int32; documents never attend to each other. None: one document.
          plan: which positions each branch gets.
        """
        ssm, of_ssm = _take_both(x, segment_ids, plan.ssm)
        attention, of_attention = _take_both(x, segment_ids, plan.attention)
        if is_parallel():
            parts = _part(self.ssm, ssm, of_ssm), _part(self.attention, attention, of_attention)
            ssm, attention = side_by_side(*parts)
        else:
            # A short text may lie wholly within one branch.
            ssm = self.ssm(ssm, of_ssm) if ssm.shape[1] else ssm
            attention = self.attention(attention, of_attention) if attention.shape[1] else attention
        fused = constrain(self._join(ssm, attention, plan), STREAM)
        return constrain(self._add_fused(x, fused), STREAM)

    def init_cache(self, batch: int, plan: BlockPlan, length: int) -> BlockCache:
        """Return the branches' caches before the first of `length` tokens."""
        return BlockCache(
            self.ssm.init_cache(batch, max(1, plan.ssm.count(length))),
            self.attention.init_cache(batch, max(1, plan.attention.count(length))),
        )

    def prefill(
        self, x: jax.Array, plan: BlockPlan, prompts: Prompts, length: int
    ) -> tuple[jax.Array, BlockCache]:
        """Return the stream [B, T, D] and the cache after each row, for `length` tokens."""
        ssm, of_ssm = _prefill(self.ssm, x, plan.ssm, prompts, length)
        attention, of_attention = _prefill(self.attention, x, plan.attention, prompts, length)
        fused = self._join(ssm, attention, plan)
        return constrain(self._add_fused(x, fused), STREAM), BlockCache(of_ssm, of_attention)

    def step(
        self, x: jax.Array, plan: BlockPlan, positions: jax.Array, cache: BlockCache
    ) -> tuple[jax.Array, BlockCache]:
        """Return the stream [B, D] of tokens at `positions` [B], and the resulting cache.

        A branch to which no sequence sends its token is skipped.
        """
        if not plan.is_split:
            ssm, of_ssm = self.ssm.step(x, cache.ssm)
            attention, of_attention = self.attention.step(x, cache.attention)
            fused = jnp.concatenate((ssm, attention), axis=-1)
            return self._add_fused(x, fused), BlockCache(of_ssm, of_attention)

        attends = contains(plan.attention, positions)
        ssm, of_ssm = _step_if_any(self.ssm, x, cache.ssm, ~attends)
        attention, of_attention = _step_if_any(self.attention, x, cache.attention, attends)
        fused = jnp.where(attends[:, None], attention, ssm)
        return self._add_fused(x, fused), BlockCache(of_ssm, of_attention)

    def _join(self, ssm: jax.Array, attention: jax.Array, plan: BlockPlan) -> jax.Array:
        """Return both branches' outputs as [B, T, D] where tokens are split, else [B, T, 2D]."""
        if plan.is_split:
            return merge(attention, ssm, plan)
        return jnp.concatenate((ssm, attention), axis=-1)

    def _add_fused(self, x: jax.Array, fused: jax.Array) -> jax.Array:
        x = x + self.branch_proj(fused)
        return x + self.final_proj(self.norm(x))


def _take_both(
    x: jax.Array, segment_ids: jax.Array | None, selection: Selection
) -> tuple[jax.Array, jax.Array | None]:
    """Return the selected positions of x [B, T, D] and of segment_ids [B, T]."""
    if selection == EVERYTHING:
        return x, segment_ids
    return take(x, selection), None if segment_ids is None else take(segment_ids, selection)


def _part(branch: DecoderLayer[Any], x: jax.Array, segment_ids: jax.Array | None) -> Part:
    """Return a branch's work on x [B, T, D] and segment_ids [B, T] as a function of arrays."""
    graph, params = nnx.split(branch)

    def run(params: nnx.State, inputs: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        x, segment_ids = inputs
        return nnx.merge(graph, params)(x, segment_ids) if x.shape[1] else x

    return Part(run, params, (x, segment_ids))


def _prefill(
    branch: DecoderLayer[CacheT],
    x: jax.Array,
    selection: Selection,
    prompts: Prompts,
    length: int,
) -> tuple[jax.Array, CacheT]:
    """Return a branch's output for its positions of x [B, T, D], and its cache for `length`."""
    if selection != EVERYTHING:
        x, segment_ids = _take_both(x, prompts.segment_ids, selection)
        lengths, first = count(selection, prompts.lengths), count(selection, prompts.first)
        prompts = Prompts(lengths, first, segment_ids)
    room = max(1, selection.count(length))
    if not x.shape[1]:  # a short prompt may lie wholly within the other branch
        return x, branch.init_cache(x.shape[0], room)
    return branch.prefill(x, prompts, room)


def _step_if_any(
    branch: DecoderLayer[Any], x: jax.Array, cache: Any, active: jax.Array
) -> tuple[jax.Array, Any]:
    """Return a branch's step for the sequences that are `active` [B]; skip it where none is."""
    return jax.lax.cond(active.any(), lambda: branch.step(x, cache, active), lambda: (x, cache))


@register(FlowHNConfig)
class FlowHN(LanguageModel):
    """Parallel hybrid blocks, whose plan follows from the config and the length."""

    config: FlowHNConfig

    def make_block(self, index: int, context: LayerContext) -> Block:
        """Return block `index`; its fusion is wider where both branches see all tokens."""
        return Block(self.config, self.config.plan().blocks[index].is_split, context)

    def apply_blocks(
        self, blocks: Blocks, x: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        """Return the stream [B, T, D] after all blocks, by the plan for T tokens."""
        for block, plan in zip(blocks, self.config.plan(x.shape[1]).blocks, strict=True):
            x = block(x, segment_ids, plan=plan)
        return x

    def init_block_caches(self, batch: int, length: int) -> list[BlockCache]:
        """Return the blocks' caches before the first of `length` tokens."""
        plans = self._decode_plan(length).blocks
        return [
            block.init_cache(batch, plan, length)
            for block, plan in zip(self.blocks, plans, strict=True)
        ]

    def prefill_blocks(
        self, x: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, list[BlockCache]]:
        """Return the stream [B, T, D] and the blocks' caches after each row's tokens."""
        caches = []
        for block, plan in zip(self.blocks, self._decode_plan(length).blocks, strict=True):
            x, cache = block.prefill(x, plan, prompts, length)
            caches.append(cache)
        return x, caches

    def decode_blocks(
        self, x: jax.Array, caches: list[BlockCache], positions: jax.Array
    ) -> tuple[jax.Array, list[BlockCache]]:
        """Return the stream [B, D] of tokens at `positions` [B], and the resulting caches."""
        new_caches = []
        for block, plan, cache in zip(
            self.blocks, self._decode_plan(None).blocks, caches, strict=True
        ):
            x, new_cache = block.step(x, plan, positions, cache)
            new_caches.append(new_cache)
        return x, new_caches

    def _decode_plan(self, length: int | None) -> Plan:
        if not self.config.can_decode:
            raise ValueError(
                "model.split.scope must be 'context' for decoding; got "
                f"{self.config.split.scope!r}, which makes another plan for each length."
            )
        return self.config.plan(length)

    def flop_parts(self, length: int) -> Iterator[tuple[nnx.Module, int]]:
        """Yield each module that costs FLOPs, and how many tokens of `length` it processes."""
        for block, plan in zip(self.blocks, self.config.plan(length).blocks, strict=True):
            yield block.ssm, plan.ssm.count(length)
            yield block.attention, plan.attention.count(length)
            yield block.branch_proj, length
            yield block.final_proj, length
        yield self.output_layer, length
