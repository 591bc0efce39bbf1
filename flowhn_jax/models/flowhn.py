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
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.base import HeadDimKeys, Mamba1Keys, Mamba2Keys, ModelConfig
from flowhn_jax.models.flowhn_branches import (
    StemBlock,
    branch_part,
    prefill_branch,
    run_branch,
    step_branch,
    take_tokens,
)
from flowhn_jax.models.language_model import STREAM, Blocks, FlopPart, LanguageModel
from flowhn_jax.models.registry import register
from flowhn_jax.parallel.branch import is_parallel, side_by_side
from flowhn_jax.split import (
    BlockPlan,
    BranchDims,
    Plan,
    SplitConfig,
    contains,
    is_bounded,
    make_plan,
    merge,
)
from flowhn_jax.split.plan import EVERYTHING, partition_warning
from flowhn_jax.utils.checks import require
from kernels.partition import constrain

SSMS = ("mamba1", "mamba2")
FUSIONS = ("paper", "residual")


@dataclasses.dataclass(frozen=True)
class FlowHNConfig(Mamba2Keys, Mamba1Keys, HeadDimKeys):
    """What FlowHN reads: the keys of both branches, and the split; defaults are the paper's 135M.

    Inherited keys: those of every model (`ModelConfig`); mlp_width, heads, kv_heads and head_dim of
    attention; ssm_state, ssm_conv, ssm_expand, ssm_dt_rank, ssm_head_dim and ssm_groups of the SSM.

    Attributes:
      ssm: mixer of the SSM branch, 'mamba1' or 'mamba2'.
      attention_mlp_width: hidden units of the attention branch's MLP; 0: model.mlp_width. If they
        are more, a balance by FLOPs sends the branch fewer tokens.
      attention_rope_theta: base of the frequencies of rotary positions in the attention branch, by
        a token's position in the sequence; 0: no positions, as in the paper.
      branch_mlp: an MLP after each branch's mixer; False: none, as in the paper's figure.
      fusion: how the branches' outputs enter the residual stream: 'paper' projects them twice, each
        time with a residual; 'residual' has no parameters, the branches' own residuals count.
      split: which tokens go to which branch.
    """

    kind: ClassVar[str] = "flowhn"
    has_branches: ClassVar[bool] = True

    ssm: str = "mamba1"
    attention_mlp_width: int = 0
    attention_rope_theta: float = 0.0
    branch_mlp: bool = True
    fusion: str = "paper"
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)

    def __post_init__(self):
        for name, known in (("ssm", SSMS), ("fusion", FUSIONS)):
            value = getattr(self, name)
            require(value in known, f"model.{name}", f"one of {', '.join(known)}", value)
        super().__post_init__()
        mlp_width = self.attention_mlp_width
        require(mlp_width >= 0, "model.attention_mlp_width", "0 or above", mlp_width)
        no_mlp = "0 where model.branch_mlp is False"
        require(self.branch_mlp or not mlp_width, "model.attention_mlp_width", no_mlp, mlp_width)
        theta, size = self.attention_rope_theta, self.head_size
        require(theta >= 0, "model.attention_rope_theta", "0 or above", theta)
        if theta:
            head = "the size of a head (model.head_dim)"
            require(size % 2 == 0, head, "even for model.attention_rope_theta", size)
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
            mlp_width=self.branch_mlp_width("ssm"),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_size,
            inner=self.inner,
            state=self.ssm_state,
            conv=self.ssm_conv,
            dt_rank=0 if self.is_mamba2 else self.dt_rank,
            ssm_heads=self.ssm_heads if self.is_mamba2 else 0,
            ssm_groups=self.ssm_groups if self.is_mamba2 else 0,
            attention_mlp_width=self.attention_mlp_width or None,
        )

    def branch_mlp_width(self, branch: str) -> int:
        """Return the hidden units of the MLP of 'ssm' or 'attention', 0 without one."""
        if not self.branch_mlp:
            return 0
        return (branch == "attention" and self.attention_mlp_width) or self.mlp_width

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
            divided = [("attention", block.attention), ("the SSM", block.ssm)]
            if block.reads_all:
                divided.append(("both branches", EVERYTHING))
            for branch, selection in divided:
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


def _mixer(config: FlowHNConfig, branch: str, context: LayerContext) -> Mamba1 | Mamba2 | Attention:
    if branch == "attention":
        rope_theta = config.attention_rope_theta or None
        return Attention(config.attention_sizes, context, rope_theta=rope_theta)
    if config.is_mamba2:
        return Mamba2(config.mamba2_sizes, context)
    return Mamba1(config.mamba1_sizes, context)


def _layer(
    config: FlowHNConfig,
    branch: str,
    mixer: Mamba1 | Mamba2 | Attention,
    context: LayerContext,
) -> DecoderLayer[Any]:
    """Return the decoder layer of the branch 'ssm' or 'attention' around its mixer."""
    return DecoderLayer(mixer, config.width, config.branch_mlp_width(branch), context)


class BlockCache(NamedTuple):
    """The caches of both branches, each of the tokens that it has read."""

    ssm: Mamba1Cache | Mamba2Cache
    attention: KVCache


class Block(nnx.Module):
    """An SSM branch and an attention branch in parallel, and the fusion of their outputs."""

    def __init__(self, config: FlowHNConfig, is_split: bool, context: LayerContext):
        width = config.width
        # Both mixers draw their parameters before the rest of the branches does.
        mixers = {name: _mixer(config, name, context) for name in ("ssm", "attention")}
        self.ssm = _layer(config, "ssm", mixers["ssm"], context)
        self.attention = _layer(config, "attention", mixers["attention"], context)
        self.has_projections = config.fusion == "paper"
        if self.has_projections:
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
        attention_reads, ssm_reads = plan.reads
        works = [
            (branch, read, own, take_tokens(x, segment_ids, read))
            for branch, read, own in (
                (self.ssm, ssm_reads, plan.ssm),
                (self.attention, attention_reads, plan.attention),
            )
        ]
        if is_parallel():
            parts = (branch_part(*work, length=x.shape[1]) for work in works)
            ssm, attention = side_by_side(*parts)
        else:
            ssm, attention = (run_branch(*work, length=x.shape[1]) for work in works)
        joined = constrain(self._join(x, ssm, attention, plan), STREAM)
        return constrain(self._fuse(x, joined), STREAM)

    def init_cache(self, batch: int, plan: BlockPlan, length: int) -> BlockCache:
        """Return the branches' caches before the first of `length` tokens."""
        attention, ssm = plan.reads
        return BlockCache(
            self.ssm.init_cache(batch, max(1, ssm.count(length))),
            self.attention.init_cache(batch, max(1, attention.count(length))),
        )

    def prefill(
        self, x: jax.Array, plan: BlockPlan, prompts: Prompts, length: int
    ) -> tuple[jax.Array, BlockCache]:
        """Return the stream [B, T, D] and the cache after each row, for `length` tokens."""
        attention_reads, ssm_reads = plan.reads
        ssm, of_ssm = prefill_branch(self.ssm, ssm_reads, plan.ssm, x, prompts, length)
        attention, of_attention = prefill_branch(
            self.attention, attention_reads, plan.attention, x, prompts, length
        )
        joined = self._join(x, ssm, attention, plan)
        return constrain(self._fuse(x, joined), STREAM), BlockCache(of_ssm, of_attention)

    def step(
        self, x: jax.Array, plan: BlockPlan, positions: jax.Array, cache: BlockCache
    ) -> tuple[jax.Array, BlockCache]:
        """Return the stream [B, D] of tokens at `positions` [B], and the resulting cache.

        A branch to which no sequence sends its token is skipped.
        """
        if not plan.is_split:
            ssm, of_ssm = self.ssm.step(x, cache.ssm)
            attention, of_attention = self.attention.step(x, cache.attention)
            joined = self._join_shared(x, ssm, attention)
            return self._fuse(x, joined), BlockCache(of_ssm, of_attention)

        attends = contains(plan.attention, positions)
        ssm, of_ssm = step_branch(
            self.ssm, x, cache.ssm, ~attends, positions, reads_all=plan.reads_all
        )
        attention, of_attention = step_branch(
            self.attention, x, cache.attention, attends, positions, reads_all=plan.reads_all
        )
        joined = jnp.where(attends[:, None], attention, ssm)
        return self._fuse(x, joined), BlockCache(of_ssm, of_attention)

    def _join(
        self, x: jax.Array, ssm: jax.Array, attention: jax.Array, plan: BlockPlan
    ) -> jax.Array:
        """Return the branches' outputs for x [B, T, D] in order of position, as `_fuse` takes them.

        That is [B, T, D] where tokens are split; else see `_join_shared`.
        """
        if plan.is_split:
            return merge(attention, ssm, plan)
        return self._join_shared(x, ssm, attention)

    def _join_shared(self, x: jax.Array, ssm: jax.Array, attention: jax.Array) -> jax.Array:
        """Return the outputs of both branches for the same tokens x [..., D], joined.

        For the paper's fusion they are concatenated, [..., 2D]. Otherwise the stream [..., D] is x
        plus what each branch adds to it.
        """
        if self.has_projections:
            return jnp.concatenate((ssm, attention), axis=-1)
        before, first, second = (y.astype(jnp.float32) for y in (x, ssm, attention))
        return (first + second - before).astype(x.dtype)

    def _fuse(self, x: jax.Array, joined: jax.Array) -> jax.Array:
        """Return the stream [..., D] after the block, for the stream x [..., D] before it."""
        if not self.has_projections:
            return joined
        x = x + self.branch_proj(joined)
        return x + self.final_proj(self.norm(x))


@register(FlowHNConfig)
class FlowHN(LanguageModel):
    """Parallel hybrid blocks, whose plan follows from the config and the length."""

    config: FlowHNConfig

    def make_block(self, index: int, context: LayerContext) -> Block | StemBlock:
        """Return block `index`; its fusion is wider where both branches see all tokens."""
        config = self.config
        kind = config.split.stem_kind
        if index < config.split.stem and kind != "no_split":
            return StemBlock(_layer(config, kind, _mixer(config, kind, context), context))
        return Block(config, config.plan().blocks[index].is_split, context)

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

    def flop_parts(self, length: int) -> Iterator[FlopPart]:
        """Yield each module that costs FLOPs, and how many tokens of `length` it processes."""
        for block, plan in zip(self.blocks, self.config.plan(length).blocks, strict=True):
            if isinstance(block, StemBlock):
                yield FlopPart(block.layer, length)
                continue
            attention_reads, ssm_reads = (each.count(length) for each in plan.reads)
            yield FlopPart(block.ssm, plan.ssm.count(length), ssm_reads)
            yield FlopPart(block.attention, plan.attention.count(length), attention_reads)
            if block.has_projections:
                yield FlopPart(block.branch_proj, length)
                yield FlopPart(block.final_proj, length)
        yield FlopPart(self.output_layer, length)
