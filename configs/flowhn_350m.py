"""FlowHN 350M: 354 million parameters, 61,000 steps of 16 x 1024 tokens (1 billion).

Chips, hours and loss: not measured yet. `flowhn aot --config=flowhn_350m --topology=v5e:4x4`
says whether it fits those chips.

  flowhn prepare --source=FOLDER --tokenizer=FILE.json --out=data/350m --context=1024
  flowhn train --config=flowhn_350m:fac_split --workdir=runs/350m --config.data.path=data/350m

After the colon: no_split, ae_split, fa_split, fac_split (default), fai_split, learned_split, or
best, the split that was found to keep most of the quality (docs/architecture.md).
"""

from flowhn_jax import recipes


def get_config(variant: str = "fac_split"):
    config = recipes.flowhn(variant, blocks=6, width=1024, mlp_width=4096)

    config.train.steps = 61_000  # 1 billion tokens
    config.train.batch_size = 16
    config.train.learning_rate = 3e-4
    return config
