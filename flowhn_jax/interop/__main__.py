"""`python -m flowhn_jax.interop`: the command of `commands/interop.py`."""

from flowhn_jax.commands import interop

if __name__ == "__main__":
    interop.run()
