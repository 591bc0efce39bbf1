"""Train a model: python train.py --config=configs/flowhn_tiny.py --workdir=runs/tiny."""

from flowhn_jax.commands import train

if __name__ == "__main__":
    train.run()
