"""Baselines of FlowHN 350M: `--config=configs/baseline_350m.py:llama`, or another of SIZES."""

from flowhn_jax import recipes

SIZES = {
    "llama": dict(blocks=16, mlp_width=3744),
    "mamba1": dict(blocks=34),
    "mamba2": dict(blocks=34, ssm_state=128),
    "jamba": dict(blocks=16, mlp_width=2592),
    "shm": dict(blocks=12, mlp_width=4608),
    "hymba": dict(blocks=12, mlp_width=3040, window=512),
    "falcon_h1": dict(blocks=12, mlp_width=3120, ssm_state=128),
}


def get_config(kind: str = "llama"):
    return recipes.baseline(recipes.load("flowhn_350m", "no_split"), kind, SIZES)
