"""`python -m flowhn_jax.data.synthetic`: the command `flowhn synthetic`."""

from flowhn_jax.commands import synthetic

if __name__ == "__main__":
    synthetic.run()
