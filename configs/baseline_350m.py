"""Baselines of FlowHN 350M: as many parameters, the same data, tokens and optimizer.

Chips, hours and loss: not measured yet.

  flowhn train --config=baseline_350m:llama --workdir=runs/llama --config.data.path=data/350m

After the colon: llama (default), mamba1, mamba2, jamba, shm, hymba or falcon_h1.
"""

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
