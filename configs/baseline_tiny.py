"""Baselines of FlowHN tiny: `--config=configs/baseline_tiny.py:llama`, or another of SIZES."""

from flowhn_jax import recipes

SIZES = {
    "llama": dict(blocks=8, mlp_width=408),
    "mamba1": dict(blocks=14),
    "mamba2": dict(blocks=14, ssm_state=64),
    "jamba": dict(blocks=8),
    "shm": dict(blocks=8, mlp_width=320),
    "hymba": dict(blocks=7, mlp_width=160, meta_tokens=16, window=128),
    "falcon_h1": dict(blocks=6, mlp_width=280, ssm_state=64),
}


def get_config(kind: str = "llama"):
    return recipes.baseline(recipes.load("flowhn_tiny", "no_split"), kind, SIZES)
