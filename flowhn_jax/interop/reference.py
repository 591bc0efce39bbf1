"""The authors' PyTorch checkpoints of FlowHN.

Their parameters are named as in Hugging Face's Jamba. Their four `Parallel_Mode`s are

| mode | in their paper | what their code does                           | strategy                |
|------|----------------|------------------------------------------------|-------------------------|
| A    | No_Split       | both branches see every token                  | `no_split`              |
| B    | AE_Split       | alternating halves                             | `ae_split`              |
| C    | FA_Split       | attention gets the first 59 %, a constant      | `fa_split_reference`    |
| D    | FAC_Split      | halves as in B, but the odd token on the other | `alternating_reference` |

The split depends on the length of the sequence, hence `split.scope='sequence'`.
"""

import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from flowhn_jax.config import FlowHNConfig, ModelConfig
from flowhn_jax.interop.layout import EMBEDDING, HEAD, Path, assemble, parse_path, to_theirs
from flowhn_jax.interop.names import ATTENTION, FEED_FORWARD, JAMBA_MODEL, MAMBA1, NORMS
from flowhn_jax.interop.torch_files import import_torch, read_state_dict
from flowhn_jax.models import Params
from flowhn_jax.split import SplitConfig
from flowhn_jax.storage import AnyPath, place
from flowhn_jax.utils.text import one_line

MODES = {
    "A": "no_split",
    "B": "ae_split",
    "C": "fa_split_reference",
    "D": "alternating_reference",
}

_WITHOUT_TORCH = ", or use an .npz file of the arrays"
# The authors' code has no other values of these keys of `model`.
AUTHORS_KEYS = {
    "ssm": "mamba1",
    "branch_mlp": True,
    "fusion": "paper",
    "attention_mlp_width": 0,
    "attention_rope_theta": 0,
}
_AUTHORS_HEADS = 32
_MIN_HEAD_DIM = 16  # with a smaller one, the model was hardly trained with 32 heads
_SSM_BRANCH = MAMBA1 | FEED_FORWARD | NORMS
_ATTENTION_BRANCH = ATTENTION | FEED_FORWARD | NORMS
_BLOCK = {
    **{f"mamba.{theirs}": f"ssm/{ours}" for theirs, ours in _SSM_BRANCH.items()},
    **{f"atten.{theirs}": f"attention/{ours}" for theirs, ours in _ATTENTION_BRANCH.items()},
    "branch_proj.weight": "branch_proj/kernel",
    "pre_ff_layernorm.weight": "norm/scale",
    "final_proj.weight": "final_proj/kernel",
}


def parameter_names(blocks: int) -> dict[str, Path]:
    """Return the path of each of our parameters, by its name in their model."""
    names = dict(JAMBA_MODEL)
    for block in range(blocks):
        for theirs, ours in _BLOCK.items():
            names[f"model.layers.{block}.{theirs}"] = f"blocks/{block}/{ours}"
    return {theirs: parse_path(ours) for theirs, ours in names.items()}


def read_arrays(source: Any) -> dict[str, np.ndarray]:
    """Return the state dict in a mapping, an .npz or a .pth file, as float32 arrays."""
    arrays: Mapping[str, Any]
    if isinstance(source, Mapping):
        arrays = {
            name: array.float().numpy() if hasattr(array, "numpy") else array
            for name, array in source.items()
        }
    else:
        path = place(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"The checkpoint must be an .npz or a .pth file; {path!r} is not a file."
            )
        with path.fetched() as local:
            if path.name.endswith(".npz"):
                arrays = _read_npz(str(local))
            else:
                arrays = read_state_dict(str(local), _WITHOUT_TORCH)
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def _read_npz(path: str) -> Mapping[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array without a name")
        with archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path!r} must be an .npz file of arrays: {one_line(error)}.") from error


def infer_config(arrays: Mapping[str, np.ndarray], mode: str, heads: int | None) -> FlowHNConfig:
    """Return the model's config, inferred from the shapes of the arrays, `mode` and `heads`."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}.")
    shapes = {name: array.shape for name, array in arrays.items()}
    layers = [re.match(r"model\.layers\.(\d+)\.", name) for name in shapes]
    blocks = 1 + max((int(match[1]) for match in layers if match), default=-1)
    first = "model.layers.0."
    needed = [*JAMBA_MODEL, *(first + name for name in _BLOCK)]
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(
            f"The checkpoint must have all parameters of FlowHN; {len(missing)} are missing from "
            f"its {len(shapes)} arrays, the first is {missing[0]!r}."
        )
    ranks = {
        "model.embed_tokens.weight": 2,
        first + "mamba.mamba.A_log": 2,
        first + "mamba.mamba.conv1d.weight": 3,
        first + "mamba.mamba.dt_proj.weight": 2,
        first + "mamba.feed_forward.up_proj.weight": 2,
        first + "atten.self_attn.k_proj.weight": 2,
    }
    for name, rank in ranks.items():
        if len(shapes[name]) != rank:
            raise ValueError(f"{name} must have {rank} dimensions; got shape {shapes[name]}.")
    vocab_size, width = shapes["model.embed_tokens.weight"]
    inner, state = shapes[first + "mamba.mamba.A_log"]
    kv_width = shapes[first + "atten.self_attn.k_proj.weight"][0]
    if heads is None and width < _AUTHORS_HEADS * _MIN_HEAD_DIM:
        raise ValueError(
            f"Width {width} is too small for the authors' {_AUTHORS_HEADS} heads, and the shapes "
            "do not determine the number of heads; give it with heads=..."
        )
    heads = heads or _AUTHORS_HEADS
    if width % heads or kv_width % (width // heads):
        raise ValueError(
            f"Width {width} and key-value width {kv_width} must divide into the {heads} heads; "
            "give the model's number of heads with heads=..."
        )
    return FlowHNConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=shapes[first + "mamba.feed_forward.up_proj.weight"][0],
        blocks=blocks,
        heads=heads,
        kv_heads=kv_width // (width // heads),
        ssm_state=state,
        ssm_conv=shapes[first + "mamba.mamba.conv1d.weight"][2],
        ssm_expand=inner // width,
        ssm_dt_rank=shapes[first + "mamba.mamba.dt_proj.weight"][1],
        split=SplitConfig(strategy=MODES[mode], scope="sequence"),
    )


def load(source: Any, mode: str, *, heads: int | None = None) -> tuple[FlowHNConfig, Params]:
    """Return the config and the parameters of an authors' checkpoint, for `models.forward`.

    Args:
      source: their state dict: a mapping of names to arrays or tensors, an .npz file of arrays, or
        a .pth file (read with weights_only=True; needs torch).
      mode: their Parallel_Mode, 'A', 'B', 'C' or 'D'; see the table at the top of this module.
      heads: number of query heads, which the shapes do not determine; None: the authors' 32.

    Raises:
      ValueError: a name or shape is not FlowHN's, the mode is unknown, or the file is a pickled
        model.
      FileNotFoundError: there is no such file.
    """
    arrays = read_arrays(source)
    config = infer_config(arrays, mode, heads)
    return config, assemble(config, arrays, parameter_names(config.blocks))


def save(out: AnyPath, config: ModelConfig, params: Params) -> str:
    """Write the authors' state dict, which their code loads; return their Parallel_Mode for it.

    Args:
      out: a .pth file (needs torch), or an .npz file of arrays.
      config: a FlowHN that their code has: Mamba-1, MLPs in the branches, and a strategy of the
        table at the top of this module. They split each sequence by its own length, so where tokens
        are split, their logits are ours for sequences of `config.context` tokens.
      params: the model's parameters. The table of a tied model is written as their head, too.

    Raises:
      ValueError: their code does not have this model, or the name has another ending.
      ImportError: torch is not installed.
    """
    mode = _mode_of(config)
    assert isinstance(config, FlowHNConfig)
    target = place(out)
    ours: dict[Path, Any] = dict(flatten_dict(params))
    if config.tie_embeddings:  # their head is a parameter of its own
        ours[HEAD] = np.asarray(ours[EMBEDDING]).T
    arrays = {
        name: np.ascontiguousarray(to_theirs(path, np.asarray(ours[path])), np.float32)
        for name, path in parameter_names(config.blocks).items()
    }
    if not target.name.endswith((".npz", ".pth")):
        raise ValueError(
            f"--out must end in .pth or .npz for --format=reference; got {str(out)!r}."
        )
    target.parent.make_folder()
    with target.writing() as local:
        if target.name.endswith(".npz"):
            with local.open("wb") as file:  # to a name, NumPy would add an ending
                np.savez(file, allow_pickle=False, **arrays)
        else:
            torch = import_torch(f"Writing {str(out)!r}", _WITHOUT_TORCH)
            torch.save({name: torch.tensor(array) for name, array in arrays.items()}, local)
    return mode


def _mode_of(config: ModelConfig) -> str:
    """Return the authors' Parallel_Mode of a model.

    Raises:
      ValueError: their code does not have this model.
    """
    strategies = {strategy: mode for mode, strategy in MODES.items()}
    for key, needed in {"kind": FlowHNConfig.kind, **AUTHORS_KEYS}.items():
        value = getattr(config, key, None)
        if value != needed:
            raise ValueError(f"model.{key} must be {needed} for --format=reference; got {value!r}.")
    assert isinstance(config, FlowHNConfig)
    if config.head_size * config.heads != config.width:
        raise ValueError(
            f"model.head_dim must be model.width / model.heads for --format=reference; got "
            f"{config.head_dim}."
        )
    is_mixed = config.split.stem > 0 and config.split.strategy != "no_split"
    is_mixed |= config.split.stem_kind != "no_split" or config.split.reads != "own"
    if config.split.strategy not in strategies or is_mixed:
        raise ValueError(
            f"model.split.strategy must be one of {', '.join(strategies)}, without a stem and with "
            "model.split.reads 'own', for --format=reference: the authors' code has no other; got "
            f"{config.split.strategy!r} with a stem of {config.split.stem} and reads "
            f"{config.split.reads!r}."
        )
    return strategies[config.split.strategy]
