"""Sharding rules: which mesh axes parameters, gradients and optimizer state are sharded over."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.partition import AXES, divided

_SHARD = AXES["shard"]
_ALL = ("tensor", *_SHARD)

# By the end of a parameter's path; the first match counts. Of a kernel's two dimensions the model's
# width is sharded over fsdp and sequence, and the other (heads, channels, MLP units or vocabulary)
# over tensor: the first kernel of a branch by its outputs, the last one by its inputs. The
# embedding is sharded as the transposed head is, which may be tied to it.
_RULES = tuple(
    (re.compile(rf"(^|/){pattern}$"), spec)
    for pattern, spec in (
        ("embed/embedding", P("tensor", _SHARD)),
        ("head/kernel", P(_SHARD, "tensor")),
        ("[qkv]_proj/kernel", P(_SHARD, "tensor")),
        ("o_proj/kernel", P("tensor", _SHARD)),
        ("mlp/(gate|up)_proj/kernel", P(_SHARD, "tensor")),
        ("mlp/down_proj/kernel", P("tensor", _SHARD)),
        # Mamba-1's is [D, 2, E], for u and z. Mamba-2's is [D, ...], of parts of different sizes
        # that sharding would separate from their heads.
        ("in_proj/kernel", P(_SHARD, None, "tensor")),
        ("x_proj/kernel", P(_ALL, None)),
        ("dt_proj/kernel", P(None, _ALL)),
        ("out_proj/kernel", P("tensor", _SHARD)),
        # As wide as the kernels' outputs.
        ("in_proj/bias", P(None, "tensor")),
        ("out_proj/bias", P()),
        ("conv_weight", P(None, _ALL)),
        ("a_log", P(_ALL)),
        ("(conv_bias|d|dt_bias)", P("tensor")),
        ("(branch|final)_proj/kernel", P(_SHARD, "tensor")),
        ("([qkv]|gate|up)_proj/bias", P("tensor")),
        ("(o|down)_proj/bias", P()),
        (r"(\w+_)?norm/scale", P()),
        ("router/(weight|bias)", P()),
        ("meta", P(None, _SHARD)),
        ("ns_coeffs", P()),  # constants in Muon's state
    )
)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return the mesh axes of a parameter's dimensions, without those that do not divide them.

    Args:
      path: such as 'blocks/0/ssm/mixer/in_proj/kernel'. It may follow another path, as that of the
        parameter's optimizer state does.
      shape: the shape of the parameter.
      mesh: has the axes fsdp, sequence and tensor.

    Raises:
      ValueError: no rule names the parameter.
    """
    spec = next((spec for pattern, spec in _RULES if pattern.search(path)), None)
    if spec is None:
        raise ValueError(
            f"No sharding rule matches the parameter {path!r}; add one to {__name__}._RULES."
        )

    def axes_of(size: int, axes: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return divided(names, size, mesh.shape) or None

    return P(*map(axes_of, shape, spec))


def with_shardings(tree: Any, mesh: Mesh) -> Any:
    """Return a tree of parameters, or of such trees, as jax.ShapeDtypeStructs with shardings.

    Scalars, such as an optimizer's count, are replicated.
    """

    def with_sharding(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = parameter_spec(name, leaf.shape, mesh) if leaf.ndim else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(with_sharding, tree)
