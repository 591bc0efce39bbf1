"""FlowHN 135M: 132 million parameters, 61,000 steps of 16 x 1024 tokens (1 billion).

Chips, hours and loss: not measured yet. `flowhn aot --config=flowhn_135m --topology=v5e:4x4`
says whether it fits those chips.

  flowhn prepare --source=FOLDER --tokenizer=FILE.json --out=data/135m --context=1024
  flowhn train --config=flowhn_135m:fac_split --workdir=runs/135m --config.data.path=data/135m

After the colon: no_split, ae_split, fa_split, fac_split (default), fai_split, learned_split;
best, the split that was found to keep most of the quality (docs/architecture.md); or heads12,
fac_split with 12 heads of 64, of which 3 for keys and values, in place of the paper's 32 of 24.
Parameters and FLOPs are the same, but a TPU kernel takes as long for a head of 24 as for one of 64:
compiled for a v5e, a step of heads12 takes at least 45.5 ms, one of fac_split 49.3 (bounds, not
measured).
"""

from flowhn_jax import recipes


def get_config(variant: str = "fac_split"):
    has_12_heads = variant == "heads12"
    blocks = 3 if variant == recipes.BEST else 2
    strategy = "fac_split" if has_12_heads else variant
    config = recipes.flowhn(strategy, blocks=blocks, width=768, mlp_width=2048, others=["heads12"])
    if has_12_heads:
        config.model.heads = 12
        config.model.kv_heads = 3

    config.train.steps = 61_000  # 1 billion tokens
    config.train.batch_size = 16
    config.train.learning_rate = 3e-4
    return config
