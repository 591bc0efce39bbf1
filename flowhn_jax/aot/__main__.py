"""`python -m flowhn_jax.aot`: the command of `commands/aot.py`."""

from flowhn_jax.commands import aot

if __name__ == "__main__":
    aot.run()
