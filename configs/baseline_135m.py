"""Baselines of FlowHN 135M: as many parameters, the same data, tokens and optimizer.

Chips, hours and loss: not measured yet.

  flowhn train --config=baseline_135m:llama --workdir=runs/llama --config.data.path=data/135m

After the colon: llama (default), mamba1, mamba2, jamba, shm, hymba or falcon_h1.
"""

from flowhn_jax import recipes

SIZES = {
    "llama": dict(blocks=5, mlp_width=2224),
    "mamba1": dict(blocks=9),
    "mamba2": dict(blocks=9, ssm_state=128),
    "jamba": dict(blocks=8, mlp_width=272),
    "shm": dict(blocks=4, mlp_width=2432),
    # Twice as many channels as the width would leave no room for MLPs in six layers.
    "hymba": dict(blocks=6, mlp_width=1184, ssm_expand=1, window=512),
    "falcon_h1": dict(blocks=4, mlp_width=1296, ssm_state=128),
}


def get_config(kind: str = "llama"):
    return recipes.baseline(recipes.load("flowhn_135m", "no_split"), kind, SIZES)
