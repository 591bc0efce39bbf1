"""`python -m flowhn_jax.split`: the command of `commands/split.py`."""

from flowhn_jax.commands import split

if __name__ == "__main__":
    split.run()
