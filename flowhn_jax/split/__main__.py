"""Entry point of `python -m flowhn_jax.split`: runs `commands/split.py`."""

from flowhn_jax.commands import split

if __name__ == "__main__":
    split.run()
