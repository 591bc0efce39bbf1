"""The entry point of `python -m flowhn_jax.data.synthetic`; see `commands.synthetic`."""

from flowhn_jax.commands import synthetic

if __name__ == "__main__":
    synthetic.run()
