"""What a device holds of a train step, read off the compiled program."""

import re

import jax
import pytest

from flowhn_jax import models
from flowhn_jax.config import MeshConfig
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training.step import lower_train_step
from tests.small import small_config


@pytest.fixture(scope="module")
def config():
    model = {"width": 64, "mlp_width": 160, "vocab_size": 328, "blocks": 1}
    return small_config(model=model)


@pytest.fixture(scope="module")
def steps(config):
    meshes = {n: make_mesh(MeshConfig(data=8 // n, fsdp=n), 8) for n in (1, 2, 8)}
    return {n: lower_train_step(config, mesh).compile() for n, mesh in meshes.items()}


@pytest.mark.slow
def test_memory_falls_with_fsdp(steps):
    held = {n: step.memory_analysis().argument_size_in_bytes for n, step in steps.items()}
    assert held[2] < 1.05 * held[1] / 2
    assert held[8] < 1.3 * held[1] / 8  # vectors are whole on every device
    used = {n: step.memory_analysis().temp_size_in_bytes for n, step in steps.items()}
    assert used[8] < used[1]


def test_no_whole_matrix_goes_in_or_out_or_through_the_optimizer(config, steps):
    """A matrix is whole where it is gathered for a product, and as one product's gradient."""
    matrices = {
        "f32[" + ",".join(map(str, leaf.shape)) + "]"
        for leaf in jax.tree.leaves(models.abstract_params(config.model))
        if leaf.size >= 64 * 64
    }
    text = steps[8].as_text()
    layout = re.search(r"entry_computation_layout=(.*)", text)[1]
    assert not [matrix for matrix in matrices if matrix in layout]
    # AdamW's root of the second moment, wherever it is fused into.
    roots = re.findall(r"= (f32\[[\d,]*\])\S* (?:sqrt|rsqrt)\(", text)
    assert roots
    assert not matrices.intersection(roots)
    gathered = re.findall(r"= (f32\[[\d,]*\])\S* all-gather\(", text)
    assert matrices.intersection(gathered)
    in_one = re.findall(r"= (f32\[[\d,]*\])\S* (?:sqrt|rsqrt)\(", steps[1].as_text())
    assert matrices.intersection(in_one)  # as it would be without
