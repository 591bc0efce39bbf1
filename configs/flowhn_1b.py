"""FlowHN 1B: `--config=configs/flowhn_1b.py:fac_split`."""

from flowhn_jax import recipes


def get_config(strategy: str = "fac_split"):
    config = recipes.paper(strategy)

    config.model.width = 2048
    config.model.mlp_width = 8192
    config.model.blocks = 6

    config.train.steps = 61_000  # 2 billion tokens
    config.train.batch_size = 32
    config.train.learning_rate = 1e-4
    config.train.remat = "dots"
    return config
