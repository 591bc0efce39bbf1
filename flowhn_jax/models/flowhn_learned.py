"""FlowHN's block with a learned split: a router sends each token to one of the branches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowhn_jax.layers.attention import KVCache
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.mamba1 import Mamba1Cache
from flowhn_jax.layers.mamba2 import Mamba2Cache
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.layers.router import Router, gate_update
from flowhn_jax.models.flowhn_blocks import BranchInputs, ParallelBranches
from flowhn_jax.models.flowhn_config import FlowHNConfig
from flowhn_jax.models.language_model import STREAM
from flowhn_jax.parallel.branch import is_parallel, side_by_side
from flowhn_jax.split import LearnedBlockPlan
from flowhn_jax.split.routing import (
    Routes,
    count_attended,
    make_routes,
    merge_routed,
    step_routes,
    take_routed,
)
from kernels.partition import constrain


class LearnedBlockCache(NamedTuple):
    """What the next token needs of the tokens so far.

    Attributes:
      ssm: the cache of the SSM branch, of its own tokens.
      attention: that of the attention branch.
      attended: [B] int32, tokens of the current window that went to attention.
    """

    ssm: Mamba1Cache | Mamba2Cache
    attention: KVCache
    attended: jax.Array


class LearnedBlock(ParallelBranches):
    """Branches that share the tokens by the scores of a router."""

    def __init__(self, config: FlowHNConfig, plan: LearnedBlockPlan, context: LayerContext):
        super().__init__(config, plan.is_split, context)
        share = plan.attention.width / plan.attention.period
        self.router = Router(config.width, share, context)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None = None, *, plan: LearnedBlockPlan
    ) -> jax.Array:
        """Return the stream [B, T, D] after the block; arguments as those of `Block`."""
        scores = self.router(x)
        routes = make_routes(scores, plan.attention)
        of_ssm, of_attention = self._take(x, segment_ids, routes, plan)
        if is_parallel():
            parts = self.ssm.part(of_ssm), self.attention.part(of_attention)
            ssm, attention = side_by_side(*parts)
        else:
            ssm, attention = self.ssm.run(of_ssm), self.attention.run(of_attention)
        return self._join(x, ssm, attention, scores, routes, plan)

    def init_cache(self, batch: int, plan: LearnedBlockPlan, length: int) -> LearnedBlockCache:
        """Return the block's cache before the first of `length` tokens."""
        return LearnedBlockCache(
            self.ssm.init_cache(batch, plan.ssm.count(length)),
            self.attention.init_cache(batch, plan.attention.count(length)),
            jnp.zeros(batch, jnp.int32),
        )

    def prefill(
        self, x: jax.Array, plan: LearnedBlockPlan, prompts: Prompts, length: int
    ) -> tuple[jax.Array, LearnedBlockCache]:
        """Return the stream [B, T, D] and the cache after each row, for `length` tokens."""
        scores = self.router(x)
        routes = make_routes(scores, plan.attention)
        of_ssm, of_attention = self._take(x, prompts.segment_ids, routes, plan)
        lengths, first = (count_attended(routes, n) for n in (prompts.lengths, prompts.first))
        attention, attention_cache = self.attention.prefill(
            of_attention.x,
            Prompts(lengths, first, of_attention.segment_ids),
            plan.attention.count(length),
            **of_attention.options,
        )
        ssm, ssm_cache = self.ssm.prefill(
            of_ssm.x,
            Prompts(prompts.lengths - lengths, prompts.first - first, of_ssm.segment_ids),
            plan.ssm.count(length),
        )
        whole_windows = prompts.lengths // plan.attention.period
        attended = lengths - whole_windows * plan.attention.width
        y = self._join(x, ssm, attention, scores, routes, plan)
        return y, LearnedBlockCache(ssm_cache, attention_cache, attended)

    def step(
        self, x: jax.Array, plan: LearnedBlockPlan, positions: jax.Array, cache: LearnedBlockCache
    ) -> tuple[jax.Array, LearnedBlockCache]:
        """Return the stream [B, D] of tokens at `positions` [B], and the resulting cache.

        A branch to which no sequence sends its token is skipped.
        """
        scores = self.router(x)
        attends, attended = step_routes(scores, positions, cache.attended, plan.attention)
        ssm, of_ssm = self.ssm.step_active(x, cache.ssm, ~attends, positions, reads_all=False)
        attention, of_attention = self.attention.step_active(
            x, cache.attention, attends, positions, reads_all=False
        )
        y = jnp.where(attends[:, None], attention, ssm)
        y = self.fuse(x, gate_update(x, y, scores, attends))
        return y, LearnedBlockCache(of_ssm, of_attention, attended)

    def _take(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None,
        routes: Routes,
        plan: LearnedBlockPlan,
    ) -> tuple[BranchInputs, BranchInputs]:
        """Return the inputs of the SSM and of attention; x [B, T, D], segment_ids [B, T]."""
        attention, ssm = take_routed(x, routes, plan.attention)
        attention_ids = ssm_ids = None
        if segment_ids is not None:
            attention_ids, ssm_ids = take_routed(segment_ids, routes, plan.attention)
        options = {}
        if self.attention.rotates:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
            options["positions"] = take_routed(positions, routes, plan.attention)[0]
        return BranchInputs(ssm, ssm_ids, {}), BranchInputs(attention, attention_ids, options)

    def _join(
        self,
        x: jax.Array,
        ssm: jax.Array,
        attention: jax.Array,
        scores: jax.Array,
        routes: Routes,
        plan: LearnedBlockPlan,
    ) -> jax.Array:
        """Return the stream [B, T, D] after the block, of x and the branches' outputs."""
        y = constrain(merge_routed(attention, ssm, routes, plan.attention), STREAM)
        joined = gate_update(x, y, scores, routes.attends)
        return self.fuse(x, joined)
