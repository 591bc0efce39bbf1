"""`python -m flowhn_jax.sweep`: the command `flowhn sweep`."""

from flowhn_jax.commands import sweep

if __name__ == "__main__":
    sweep.run()
