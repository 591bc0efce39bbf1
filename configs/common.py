"""The paper's recipe (arXiv 2505.19472), shared by all sizes."""

import ml_collections

from flowhn_jax import config as config_lib


def get_config(strategy: str = "fac_split") -> ml_collections.ConfigDict:
    """AdamW, cosine with 10 % warm-up, sequence 1024, Jamba's vocabulary, untied head."""
    config = config_lib.default()

    model = config.model
    model.vocab_size = 65536
    model.context = 1024
    model.heads = 32
    model.kv_heads = 8
    model.ssm_state = 16
    model.ssm_conv = 4
    model.ssm_expand = 2
    model.split.strategy = strategy

    train = config.train
    train.beta1 = 0.9
    train.beta2 = 0.95
    train.weight_decay = 0.1
    train.clip_norm = 1.0
    train.warmup = 0.1
    train.eval_windows = 64  # while training; eval.py scores the whole validation set

    return config
