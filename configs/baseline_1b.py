"""Baselines of FlowHN 1B: as many parameters, the same data, tokens and optimizer.

Chips, hours and loss: not measured yet.

  flowhn train --config=baseline_1b:llama --workdir=runs/llama --config.data.path=data/1b

After the colon: llama (default), mamba1, mamba2, jamba, shm, hymba or falcon_h1.
"""

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
