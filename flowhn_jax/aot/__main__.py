"""`python -m flowhn_jax.aot`: the command `flowhn aot`."""

from flowhn_jax.commands import aot

if __name__ == "__main__":
    aot.run()
