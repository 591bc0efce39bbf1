"""FlowHN 135M: 132 million parameters, 61,000 steps of 16 x 1024 tokens (1 billion).

Chips, hours and loss: not measured yet. `flowhn aot --config=flowhn_135m --topology=v5e:4x4`
says whether it fits those chips.

  flowhn prepare --source=FOLDER --tokenizer=FILE.json --out=data/135m --context=1024
  flowhn train --config=flowhn_135m:fac_split --workdir=runs/135m --config.data.path=data/135m

After the colon: no_split, ae_split, fa_split, fac_split (default) or fai_split.
"""

from flowhn_jax import recipes


def get_config(strategy: str = "fac_split"):
    config = recipes.paper(strategy)

    config.model.width = 768
    config.model.mlp_width = 2048
    config.model.blocks = 2

    config.train.steps = 61_000  # 1 billion tokens
    config.train.batch_size = 16
    config.train.learning_rate = 3e-4
    return config
