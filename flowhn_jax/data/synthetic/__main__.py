"""`python -m flowhn_jax.data.synthetic`: the command of `commands/synthetic.py`."""

from flowhn_jax.commands import synthetic

if __name__ == "__main__":
    synthetic.run()
