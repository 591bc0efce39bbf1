"""Small configs for tests."""

from flowhn_jax import config as config_lib
from flowhn_jax.config import Config, ModelConfig


def small_config(strategy: str = "fac_split", **groups) -> Config:
    """Return a FlowHN of a few thousand parameters; `model`, `split`, `train` override its keys."""
    model = {
        "vocab_size": 257,
        "context": 24,
        "width": 16,
        "mlp_width": 24,
        "blocks": 2,
        "heads": 4,
        "kv_heads": 2,
        "ssm_state": 4,
        "ssm_dt_rank": 3,  # the norm of a single number would be its sign, which is ill-conditioned
        "dtype": "float32",
        "init_std": 0.2,
        "split": {"strategy": strategy, "align": 1, "period": 7, **groups.get("split", {})},
        **groups.get("model", {}),
    }
    train = {"batch_size": 8, "steps": 8, "warmup": 0.25, **groups.get("train", {})}
    rest = {
        name: group for name, group in groups.items() if name not in ("model", "split", "train")
    }
    return config_lib.parse({"model": model, "train": train, **rest})


_ATTENTION = {"heads": 4, "kv_heads": 2, "mlp_width": 24}
_SMALL = {
    "llama": _ATTENTION,
    "mamba1": {"ssm_state": 4},
    "mamba2": {"ssm_state": 4, "ssm_head_dim": 8, "ssm_groups": 2},
    "jamba": _ATTENTION
    | {"ssm_state": 4, "ssm_dt_rank": 3, "attention_period": 3, "attention_offset": 1, "blocks": 3},
    "shm": _ATTENTION | {"ssm_state": 4, "ssm_dt_rank": 3},
    # Layers 0, 3 and 5 are global; layer 2 borrows.
    "hymba": _ATTENTION
    | {"ssm_state": 4, "ssm_dt_rank": 3, "meta_tokens": 3, "window": 5, "blocks": 6},
    "falcon_h1": _ATTENTION
    | {
        "ssm_state": 4,
        "ssm_head_dim": 8,
        "multipliers": {"embedding": 2.0, "head": 0.5, "attention_in": 0.9, "attention_out": 1.1}
        | {"key": 0.7, "ssm_in": 1.2, "ssm_out": 0.8, "ssm_z": 0.6, "ssm_x": 1.3, "ssm_b": 0.5}
        | {"ssm_c": 1.4, "ssm_dt": 0.4, "mlp_gate": 0.95, "mlp_down": 1.05},
    },
}


def small_baseline(kind: str, **model) -> ModelConfig:
    """Return a baseline of a few thousand parameters, with every part that it can have."""
    common = {"vocab_size": 61, "context": 24, "width": 16, "blocks": 2, "init_std": 0.2}
    keys = {"kind": kind, "dtype": "float32"} | common | _SMALL[kind] | model
    return config_lib.parse({"model": keys}).model


def keys(values, prefix=""):
    """Yield the keys of a nested dictionary's values, joined by dots."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
