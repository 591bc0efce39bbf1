"""Which mesh axes the parameters, their gradients and their optimizer state are cut over."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.partition import AXES, divided

_SHARD = AXES["shard"]
_ALL = ("tensor", *_SHARD)

# By the end of a parameter's path; the first that matches counts. Of a matrix product's two
# dimensions the model's width goes over fsdp and sequence, and heads, channels, MLP units and
# vocabulary go over tensor: the first product of a branch is cut by its outputs, the last one by
# its inputs.
_RULES = tuple(
    (re.compile(rf"(^|/){pattern}$"), spec)
    for pattern, spec in (
        ("embed/embedding", P("tensor", _SHARD)),
        ("head/kernel", P(_SHARD, "tensor")),
        ("[qkv]_proj/kernel", P(_SHARD, "tensor")),
        ("o_proj/kernel", P("tensor", _SHARD)),
        ("mlp/(gate|up)_proj/kernel", P(_SHARD, "tensor")),
        ("mlp/down_proj/kernel", P("tensor", _SHARD)),
        # Mamba-1's is [D, 2, E], of u and z. Mamba-2's is [D, ...], of unlike parts, which no cut
        # would leave with their heads.
        ("in_proj/kernel", P(_SHARD, None, "tensor")),
        ("x_proj/kernel", P(_ALL, None)),
        ("dt_proj/kernel", P(None, _ALL)),
        ("out_proj/kernel", P("tensor", _SHARD)),
        ("conv_weight", P(None, _ALL)),
        ("a_log", P(_ALL)),
        ("(conv_bias|d|dt_bias)", P("tensor")),
        ("(branch|final)_proj/kernel", P(_SHARD, "tensor")),
        (r"(\w+_)?norm/scale", P()),
        ("meta", P(None, _SHARD)),
    )
)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The mesh axes of a parameter's dimensions; the last that do not divide one are left out.

    Args:
      path: as 'blocks/0/ssm/mixer/in_proj/kernel'; it may have a longer path before it, as an
        optimizer's state of the parameter has.
      shape: of the parameter.
      mesh: with the axes fsdp, sequence and tensor.

    Raises:
      ValueError: no rule names the parameter.
    """
    spec = next((spec for pattern, spec in _RULES if pattern.search(path)), None)
    if spec is None:
        raise ValueError(f"No sharding rule names the parameter {path!r}.")

    def cut(size: int, axes: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return divided(names, size, mesh.shape) or None

    return P(*map(cut, shape, spec))


def with_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shapes and dtypes of a tree of parameters, or of one that holds such trees, with shardings.

    Scalars, such as an optimizer's count, are on every device.
    """

    def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = parameter_spec(name, leaf.shape, mesh) if leaf.ndim else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(placed, tree)
