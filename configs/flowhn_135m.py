"""FlowHN 135M: `--config=configs/flowhn_135m.py:fac_split`."""

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
