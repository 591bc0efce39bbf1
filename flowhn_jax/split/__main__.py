"""`python -m flowhn_jax.split`: the command `flowhn split`."""

from flowhn_jax.commands import split

if __name__ == "__main__":
    split.run()
