import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from flowhn_jax import flops, models
from flowhn_jax.config import BASELINES, FlowHNConfig
from flowhn_jax.split import (
    STRATEGIES,
    LearnedBlockPlan,
    SplitConfig,
    attention_branch_flops,
    ssm_branch_flops,
)
from flowhn_jax.split.cost import score_flops
from kernels import backends
from tests.jaxprs import equations
from tests.small import small_baseline, small_config

OPTIONS = {
    "model": {"fusion": "residual", "attention_mlp_width": 40, "attention_rope_theta": 9.0},
    "split": {"stem": 1, "stem_kind": "attention"},
}
READS_ALL = {"split": {"reads": "all"}}
READS_ALL_MAMBA2 = READS_ALL | {"model": {"ssm": "mamba2", "ssm_head_dim": 8}}


def products(config, monkeypatch):
    """FLOPs of the matrix products of a forward pass, as JAX counts shapes, with dense attention.

    Scan and convolution are loops and sums, but Mamba-2's scan is products: it is left out.
    """
    monkeypatch.setattr("flowhn_jax.layers.mamba2.ssd", lambda x, **_: x)
    tokens = jnp.zeros((1, config.context), int)
    counted = 0

    params = models.abstract_params(config)
    jaxpr = jax.make_jaxpr(lambda p: models.forward(config, p, tokens))(params).jaxpr
    for equation in equations(jaxpr, opaque=("scan",)):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = 2 * equation.outvars[0].aval.size
            for axis in contracted:
                size *= left[axis]
            counted += size
    return counted


@pytest.mark.parametrize(
    ("strategy", "options"),
    [*((s, {}) for s in STRATEGIES), ("fai_split", OPTIONS), ("fai_split", READS_ALL)],
)
def test_matrix_products_are_those_of_the_jaxpr(strategy, options, monkeypatch):
    config = small_config(strategy, **options).model
    dims = config.dims
    elementwise = dims.inner * (9 * dims.state + 2 + 2 * dims.conv)
    plan = config.plan()
    ssm_tokens = sum(block.reads[1].count(config.context) for block in plan.blocks)
    # At these lengths the CPU's attention is one block of dense scores.
    expected = flops.forward_flops(config, config.context, causal=False) - ssm_tokens * elementwise
    assert products(config, monkeypatch) == expected


@pytest.mark.parametrize("kind", BASELINES)
def test_matrix_products_of_baselines(kind, monkeypatch):
    """Exact; the rest is the scan and the convolution, as split/cost.py counts them."""
    config = small_baseline(kind)
    length = config.context
    mixers = {"llama": 0, "jamba": 2, "shm": 1}.get(kind, config.blocks)
    if kind == "hymba":
        length += config.meta_tokens
    if config.is_mamba2:
        _, inner, state, conv, _, groups = config.mamba2_sizes
        convolved = inner + 2 * groups * state
        elementwise = 5 * inner * state + 2 * inner + 2 * conv * convolved
    elif mixers:
        _, inner, state, conv, _ = config.mamba1_sizes
        elementwise = inner * (9 * state + 2 + 2 * conv)
    else:
        elementwise = 0
    found = flops.forward_flops(config, config.context, causal=False)
    assert found - mixers * length * elementwise == products(config, monkeypatch)


@pytest.mark.parametrize("kind", ["llama", "flowhn"])
def test_a_tied_head_costs_its_product_and_no_memory(kind, monkeypatch):
    """As many FLOPs as untied, counted in the jaxpr; V D fewer parameters and optimizer numbers."""
    if kind == "llama":
        untied, tied = (small_baseline(kind, tie_embeddings=tied) for tied in (False, True))
        assert flops.forward_flops(tied, 24, causal=False) == products(tied, monkeypatch)
    else:
        untied, tied = (
            small_config("fai_split", model={"tie_embeddings": tied}).model
            for tied in (False, True)
        )
    for count in (flops.forward_flops, flops.prefill_flops, flops.train_flops):
        assert count(tied, 24) == count(untied, 24)
    table = tied.vocab_size * tied.width
    assert models.param_count(untied) - models.param_count(tied) == table
    saved = flops.train_bytes(untied, 3, 24) - flops.train_bytes(tied, 3, 24)
    assert saved == 2 * 3 * 4 * table
    assert flops.decode_bytes(tied, 3, 24) == flops.decode_bytes(untied, 3, 24)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        *((s, {}) for s in STRATEGIES),
        *(("fai_split", options) for options in (OPTIONS, READS_ALL, READS_ALL_MAMBA2)),
    ],
)
def test_the_walk_agrees_with_the_planners_cost(strategy, options):
    """The planner counts a branch from its sizes alone, without the layers."""
    config = small_config(strategy, **options).model
    dims, length = config.dims, config.context
    total = 2 * dims.width * config.vocab_size * length
    for block in config.plan().blocks:
        read = length if block.reads_all else None
        total += attention_branch_flops(dims, block.attention.count(length), read=read)
        total += ssm_branch_flops(dims, block.ssm.count(length), read=read)
        if config.fusion == "paper":
            total += 2 * length * dims.width * ((1 if block.is_split else 2) + 1) * dims.width
        if isinstance(block, LearnedBlockPlan):
            total += 2 * length * dims.width  # a score of each token
    assert flops.forward_flops(config, length) == total


@pytest.mark.parametrize("kind", ["llama", "mamba1", "jamba", "hymba"])
def test_xla_counts_nearly_as_much(kind):
    """XLA also counts norms, activations, softmax and exponentials: a little more."""
    sizes = dict(width=64, context=48, vocab_size=256, blocks=5)
    if kind != "mamba1":
        sizes["mlp_width"] = 128
    config = small_baseline(kind, **sizes)
    tokens = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
    lowered = models.forward.lower(config, models.abstract_params(config), tokens)
    with backends.use("selective_scan=xla_associative"):
        counted = lowered.cost_analysis()["flops"]
    ours = flops.forward_flops(config, config.context, causal=False)
    assert 0.9 * ours < counted < 1.35 * ours


def test_windows_see_fewer_pairs():
    """Compared with a count of all pairs, one by one."""
    for tokens, window, prefix in [(20, 5, 3), (20, 30, 0), (7, 3, 6), (9, 1, 0)]:
        seen = sum(
            j <= i and (j > i - window or j < prefix) for i in range(tokens) for j in range(tokens)
        )
        assert score_flops(8, tokens, window=window, prefix=prefix) == 4 * 8 * seen


def test_prefill_runs_the_head_once():
    config = small_baseline("llama")
    all_tokens, one = flops.forward_flops(config, 24), flops.prefill_flops(config, 24)
    assert all_tokens - one == 23 * 2 * config.width * config.vocab_size


def test_fusion_and_head():
    config = FlowHNConfig(split=SplitConfig("no_split"), blocks=1)
    branches = attention_branch_flops(config.dims, 1024) + ssm_branch_flops(config.dims, 1024)
    fusion = 2 * 1024 * 768 * (2 * 768 + 768)
    assert flops.forward_flops(config, 1024) == branches + fusion + 2 * 1024 * 768 * 65536
    assert flops.train_flops(config, 1024) == 3 * flops.forward_flops(config, 1024)


def test_palm_style_counts_all_pairs():
    config = FlowHNConfig(split=SplitConfig("no_split"), blocks=2)
    extra = flops.forward_flops(config, 64, causal=False) - flops.forward_flops(config, 64)
    assert extra == 2 * 4 * 768 * (64 * 64 - 64 * 65 // 2)


def test_a_split_costs_less_than_both_branches_on_all_tokens():
    split = FlowHNConfig()
    everything = dataclasses.replace(split, split=SplitConfig("no_split"))
    assert flops.forward_flops(split, 1024) < flops.forward_flops(everything, 1024)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA Unheard Of", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    device = types.SimpleNamespace(device_kind=kind)
    assert flops.peak_flops(device) == peak
    assert flops.utilisation(1e12, device) == (None if peak is None else 1e12 / peak)


def test_a_decode_step_moves_parameters_and_caches():
    """Counted from shapes; a split block reads each branch for its share of the tokens."""
    config = small_baseline("llama")
    params = models.abstract_params(config)
    size = sum(leaf.size for leaf in jax.tree.leaves((params["blocks"], params["head"])))
    kv = 2 * config.blocks * 3 * 24 * config.kv_heads * (config.width // config.heads)
    counters = 2 * config.blocks * 3  # tokens so far, and those of earlier documents
    assert flops.decode_bytes(config, 3, 24) == 4 * (size + kv + counters)

    config = small_config("ae_split", model={"blocks": 1}).model
    params = models.abstract_params(config)["blocks"][0]
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(params[name]))
        for name in ("ssm", "attention", "branch_proj", "final_proj")
    }
    dims = config.dims
    state = dims.inner * (dims.state + dims.conv - 1)
    expected = sizes["ssm"] / 2 + sizes["attention"] / 2 + sizes["branch_proj"]
    expected += sizes["final_proj"] + config.width * config.vocab_size
    expected += 2 * state / 2 + (2 * 12 * dims.kv_heads * dims.head_dim + 2) / 2
    assert flops.decode_bytes(config, 1, 24) == pytest.approx(4 * expected)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 3350e9),
        ("NVIDIA H100 PCIe", 2000e9),
        ("TPU v5 lite", 819e9),
        ("cpu", None),
    ],
)
def test_bandwidths(kind, peak):
    assert flops.peak_bandwidth(types.SimpleNamespace(device_kind=kind)) == peak


def test_train_bytes_of_llama():
    """Products in bfloat16 with factors and results, three times; the state in float32, twice."""
    config = small_baseline("llama", dtype="bfloat16")
    assert (config.width, config.heads, config.kv_heads, config.mlp_width) == (16, 4, 2, 24)
    d, keys, f, v = 16, 2 * 4, 24, config.vocab_size
    layer = [(d, d), (d, keys), (d, keys), (d, d), (d, f), (d, f), (f, d)]
    tokens, devices = 6 * 24, 4
    numbers = sum(i * o + tokens * (i + o) / devices for i, o in layer) * config.blocks
    head = d * v + tokens * d / devices  # no logits
    state = 2 * 3 * 4 * models.param_count(config) / devices
    found = flops.train_bytes(config, 6, 24, devices=devices)
    assert found == pytest.approx(state + 3 * 2 * (numbers + head))
    halved = flops.train_bytes(config, 6, 24, devices=devices, tensor=2)
    weights = d * v + config.blocks * sum(i * o for i, o in layer)
    assert found - halved == pytest.approx(3 * 2 * weights / 2)
