"""FlowHN 1B: 1.14 billion parameters, 61,000 steps of 32 x 1024 tokens (2 billion).

Chips, hours and loss: not measured yet. `flowhn aot --config=flowhn_1b --topology=v5e:4x4`
says whether it fits those chips.

  flowhn prepare --source=FOLDER --tokenizer=FILE.json --out=data/1b --context=1024
  flowhn train --config=flowhn_1b:fac_split --workdir=runs/1b --config.data.path=data/1b

After the colon: no_split, ae_split, fa_split, fac_split (default), fai_split, learned_split, or
best, the split that was found to keep most of the quality (docs/architecture.md).
"""

from flowhn_jax import recipes


def get_config(variant: str = "fac_split"):
    config = recipes.flowhn(variant, blocks=6, width=2048, mlp_width=8192)

    config.train.steps = 61_000  # 2 billion tokens
    config.train.batch_size = 32
    config.train.learning_rate = 1e-4
    config.train.remat = "dots"
    return config
