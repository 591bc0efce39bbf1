"""Small configs for tests."""

from flowhn_jax import config as config_lib
from flowhn_jax.config import Config


def small_config(strategy: str = "fac_split", **groups) -> Config:
    """A FlowHN of a few thousand parameters; `model`, `split`, `train` override its keys."""
    model = {
        "vocab_size": 257,
        "context": 24,
        "width": 16,
        "mlp_width": 24,
        "blocks": 3,
        "heads": 4,
        "kv_heads": 2,
        "ssm_state": 4,
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
