"""Baselines of FlowHN tiny: as many parameters, the same data, tokens and optimizer.

Chips: any, also a CPU. Hours and loss of the full 1600 steps: not measured yet. After 977 steps
(2 million bytes, docs/results.md) the validation bits per byte were: llama 2.332, mamba1 2.188,
mamba2 2.202, jamba 2.189, shm 2.192, hymba 2.174, falcon_h1 2.163.

  python train.py --config=configs/baseline_tiny.py:llama --workdir=runs/llama

After the colon: llama (default), mamba1, mamba2, jamba, shm, hymba or falcon_h1.
"""

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
