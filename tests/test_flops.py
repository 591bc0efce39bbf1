import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from flowhn_jax import flops, models
from flowhn_jax.config import ModelConfig
from flowhn_jax.split import STRATEGIES, SplitConfig, attention_branch_flops, ssm_branch_flops
from tests.small import small_config


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_matrix_products_are_those_of_the_jaxpr(strategy):
    """Dense attention, and a scan and convolution that count nothing, leave the products."""
    config = small_config(strategy).model
    tokens = jnp.zeros((1, config.context), int)
    counted = 0

    def walk(jaxpr):
        nonlocal counted
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                size = 2 * equation.outvars[0].aval.size
                for axis in contracted:
                    size *= left[axis]
                counted += size
            for parameter in equation.params.values():
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns") and equation.primitive.name != "scan":
                    walk(inner)

    walk(
        jax.make_jaxpr(lambda p: models.forward(config, p, tokens))(
            models.init(config, jax.random.key(0))
        ).jaxpr
    )
    dims = config.dims
    elementwise = dims.inner * (9 * dims.state + 2 + 2 * dims.conv)
    plan = config.plan()
    ssm_tokens = sum(block.ssm.count(config.context) for block in plan.blocks)
    # At these lengths the CPU's attention is one block of dense scores.
    expected = flops.forward_flops(config, config.context, causal=False) - ssm_tokens * elementwise
    assert counted == expected


def test_fusion_and_head():
    config = ModelConfig(split=SplitConfig("no_split"), blocks=1)
    branches = attention_branch_flops(config.dims, 1024) + ssm_branch_flops(config.dims, 1024)
    fusion = 2 * 1024 * 768 * (2 * 768 + 768)
    assert flops.forward_flops(config, 1024) == branches + fusion + 2 * 1024 * 768 * 65536
    assert flops.train_flops(config, 1024) == 3 * flops.forward_flops(config, 1024)


def test_palm_style_counts_all_pairs():
    config = ModelConfig(split=SplitConfig("no_split"), blocks=2)
    extra = flops.forward_flops(config, 64, causal=False) - flops.forward_flops(config, 64)
    assert extra == 2 * 4 * 768 * (64 * 64 - 64 * 65 // 2)


def test_a_split_costs_less_than_both_branches_on_all_tokens():
    split = ModelConfig()
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
