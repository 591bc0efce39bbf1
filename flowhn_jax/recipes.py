"""Recipes: the files under `configs/`, found by name or by path, and the parts they share."""

import pathlib
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from flowhn_jax import config as config_lib
from flowhn_jax.models import registry
from flowhn_jax.split import PARITY_STRATEGIES, STRATEGIES
from flowhn_jax.utils.text import short_repr

BEST = "best"
VARIANTS = (*STRATEGIES, BEST)  # of FlowHN's recipes
_PACKAGE = pathlib.Path(__file__).parent
# An installed package has the recipes inside it, a checkout has them next to it.
_FOLDERS = _PACKAGE / "configs", _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    return sorted(path.stem for folder in _FOLDERS for path in folder.glob("[a-z]*_*.py"))


def find(name: str) -> pathlib.Path:
    """Return the file of a recipe.

    Args:
      name: a path, or one of `names()`.

    Raises:
      ValueError: there is no such recipe.
    """
    path = pathlib.Path(name)
    candidates = [path, *(folder / f"{name}.py" for folder in _FOLDERS if path.name == name)]
    try:
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        found = "not a file" if path.exists() else "not found"
    except OSError as error:  # its name is too long, or its folder may not be read
        found = f"not a file: {error.strerror}"
    raise ValueError(
        f"--config must be the file or the name of a recipe ({', '.join(names())}); got "
        f"{short_repr(name)}, which is {found}."
    )


def load(name: str, argument: str | None = None) -> ml_collections.ConfigDict:
    """Return the config of a recipe.

    Args:
      name: as for `find`.
      argument: that of the recipe's `get_config`, such as a strategy or a model; None: its default.

    Raises:
      ValueError: there is no such recipe.
    """
    get_config = runpy.run_path(str(find(name)))["get_config"]
    return get_config() if argument is None else get_config(argument)


def flowhn(
    variant: str = "fac_split",
    *,
    blocks: int,
    width: int,
    mlp_width: int,
    others: Sequence[str] = (),
) -> ml_collections.ConfigDict:
    """Return the config that FlowHN's recipes of all sizes share.

    It is the paper's (arXiv 2505.19472): AdamW, a cosine schedule with 10 % warm-up, context 1024,
    Jamba's vocabulary. 'best' has the split that was found to keep most of the quality, in place of
    the paper's (docs/architecture.md, "The best split").

    Args:
      variant: a split strategy, also one of PARITY_STRATEGIES, or 'best'.
      blocks: model.blocks. With 'best' the last two swap the halves of the context, so that each
        token passes both branches; those before them are SSM layers for all tokens.
      width: model.width.
      mlp_width: model.mlp_width.
      others: variants that the recipe itself has, for the message.

    Raises:
      ValueError: there is no such variant.
    """
    if variant not in (*VARIANTS, *PARITY_STRATEGIES):
        raise ValueError(
            f"the recipe's variant must be one of {', '.join((*VARIANTS, *others))}; got "
            f"{short_repr(variant)}."
        )
    config: Any = config_lib.default()

    config.model.update(blocks=blocks, width=width, mlp_width=mlp_width)
    config.model.update(
        vocab_size=65536, context=1024, heads=32, kv_heads=8, ssm_state=16, ssm_conv=4, ssm_expand=2
    )
    config.model.split.strategy = variant
    if variant == BEST:
        config.model.split.update(strategy="ae_split", stem=blocks - 2, stem_kind="ssm")
        config.model.update(ssm="mamba2", ssm_state=64)
        config.model.update(fusion="residual", attention_rope_theta=10000.0)
    config.train.update(beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0, warmup=0.1)
    config.train.eval_windows = 64  # while training; eval.py scores the whole validation set
    return config


def baseline(
    base: ml_collections.ConfigDict, kind: str, sizes: Mapping[str, Mapping[str, Any]]
) -> ml_collections.ConfigDict:
    """Return a baseline's config: FlowHN's data, tokens and optimizer with another model.

    Args:
      base: FlowHN's recipe at the same size; unchanged.
      kind: the baseline's model.kind.
      sizes: by kind, the model keys that differ from FlowHN's.

    Raises:
      ValueError: `sizes` has no such kind.
    """
    if kind not in sizes:
        raise ValueError(f"the model must be one of {', '.join(sizes)}; got {short_repr(kind)}.")
    default: Any = config_lib.default().model
    config: Any = base.copy_and_resolve_references()
    for key in registry.all_keys():
        if kind not in registry.reading(key):
            config.model[key] = default[key]
    config.model.kind = kind
    config.model.update(sizes[kind])
    return config
