"""`python -m flowhn_jax.compare`: the command `flowhn compare`."""

from flowhn_jax.commands import compare

if __name__ == "__main__":
    compare.run()
