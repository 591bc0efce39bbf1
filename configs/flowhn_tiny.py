"""FlowHN tiny: 1.7 million parameters, bytes as tokens, 1600 steps of 8 x 256 tokens.

Chips: any, also a CPU. Measured on 2 cores (AMD EPYC) in float32: 5 minutes 18 seconds with
`fac_split`, data preparation and two validations included. Expected validation bits per byte on the
embedded corpus: no_split 2.165, ae_split 2.358, fa_split 2.946, fac_split 2.439, fai_split 2.538
(docs/results.md).

  python train.py --config=configs/flowhn_tiny.py:fai_split --workdir=runs/tiny

After the colon: no_split, ae_split, fa_split, fac_split (default), fai_split, learned_split, or
best, the split that was found to keep most of the quality (docs/architecture.md).
"""

from flowhn_jax import recipes


def get_config(variant: str = "fac_split"):
    config = recipes.flowhn(variant, blocks=4, width=128, mlp_width=256)

    config.model.vocab_size = 384  # 256 bytes and end-of-text, rounded up
    config.model.context = 256
    config.model.heads = 4
    config.model.kv_heads = 2
    config.model.init_std = 0.1
    config.model.split.align = 16

    config.train.steps = 1600
    config.train.batch_size = 8
    config.train.learning_rate = 3e-3
    config.train.eval_windows = 0  # all of them
    config.train.log_every = 50
    config.train.eval_every = 800
    config.train.checkpoint_every = 400
    return config
