"""FlowHN 350M: `--config=configs/flowhn_350m.py:fac_split`."""

from flowhn_jax import recipes


def get_config(strategy: str = "fac_split"):
    config = recipes.paper(strategy)

    config.model.width = 1024
    config.model.mlp_width = 4096
    config.model.blocks = 6

    config.train.steps = 61_000  # 1 billion tokens
    config.train.batch_size = 16
    config.train.learning_rate = 3e-4
    return config
