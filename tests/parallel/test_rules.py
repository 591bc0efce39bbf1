import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

from flowhn_jax import config as config_lib
from flowhn_jax import models, recipes
from flowhn_jax.checkpoints.state import abstract_state
from flowhn_jax.config import BASELINES, MeshConfig
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.parallel.rules import parameter_spec, with_shardings
from tests.small import small_config


@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
@pytest.mark.parametrize("strategy", ["no_split", "fac_split"])
def test_every_parameter_has_a_rule(strategy, ssm):
    config = small_config(strategy, model={"ssm": ssm, "ssm_head_dim": 8})
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), 8)
    state = abstract_state(config, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert leaf.sharding.mesh == mesh, path


@pytest.mark.parametrize("size", ["350m", "1b"])
@pytest.mark.parametrize("kind", BASELINES)
def test_baselines_are_cut(kind, size):
    """All of their matrices, and so nearly all that they have."""
    recipe = recipes.load(f"baseline_{size}", kind)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), 8)
    config = config_lib.parse(recipe)
    params = with_shardings(models.abstract_params(config.model), mesh)
    own = whole = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        ways = 4 if config.model.is_mamba2 and "in_proj" in str(path) else 8  # fsdp alone
        own += math.prod(leaf.sharding.shard_shape(leaf.shape))
        whole += leaf.size / ways
    assert own < 1.01 * whole


def test_a_parameter_without_a_rule_is_an_error():
    mesh = make_mesh(MeshConfig(), 8)
    with pytest.raises(ValueError, match="No sharding rule matches the parameter 'blocks/0/new'"):
        parameter_spec("blocks/0/new", (2, 2), mesh)
    with pytest.raises(ValueError, match="No sharding rule"):
        with_shardings(
            {"x": {"q_projection": {"kernel": jax.ShapeDtypeStruct((2, 2), "f4")}}}, mesh
        )


@pytest.mark.parametrize("shape", [(64, 32), (63, 32), (64, 6)])
@pytest.mark.parametrize("axes", [dict(fsdp=4, tensor=2), dict(fsdp=2, sequence=2, tensor=2)])
def test_the_table_is_cut_as_the_head_is(shape, axes):
    """So a tied head needs no other layout of it."""
    mesh = make_mesh(MeshConfig(data=1, **axes), 8)
    table = parameter_spec("embed/embedding", shape, mesh)
    assert P(*reversed(table)) == parameter_spec("head/kernel", shape[::-1], mesh)


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), 8)
    path = "opt_state/1/0/mu/blocks/3/attention/mlp/up_proj/kernel"
    assert parameter_spec(path, (8, 6), mesh) == P(("fsdp", "sequence"), "tensor")
    assert parameter_spec(path, (6, 6), mesh) == P(None, "tensor")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=4), 8)
    assert parameter_spec(path, (6, 6), mesh) == P("fsdp", "tensor")
    assert parameter_spec(path, (8, 6), mesh) == P(("fsdp", "sequence"), "tensor")


@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(fsdp=2, tensor=4)])
def test_each_device_holds_its_share_of_the_papers_1b(axes):
    config = config_lib.parse(recipes.load("flowhn_1b"))
    mesh = make_mesh(MeshConfig(data=1, **axes), 8)
    params = with_shardings(models.abstract_params(config.model), mesh)
    whole, own = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        part = math.prod(leaf.sharding.shard_shape(leaf.shape))
        whole, own = whole + leaf.size, own + part
        assert part < leaf.size or leaf.ndim == 1, path
    assert own < 1.002 * whole / 8
