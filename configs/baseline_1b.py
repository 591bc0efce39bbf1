"""Baselines of FlowHN 1B: `--config=configs/baseline_1b.py:llama`, or another of SIZES."""

from flowhn_jax import recipes

SIZES = {
    "llama": dict(blocks=16, mlp_width=7456),
    "mamba1": dict(blocks=34),
    "mamba2": dict(blocks=35, ssm_state=128),
    "jamba": dict(blocks=16, mlp_width=5184),
    "shm": dict(blocks=12, mlp_width=9216),
    "hymba": dict(blocks=12, mlp_width=6096, window=512),
    "falcon_h1": dict(blocks=12, mlp_width=6304, ssm_state=128),
}


def get_config(kind: str = "llama"):
    return recipes.baseline(recipes.load("flowhn_1b", "no_split"), kind, SIZES)
