"""`python -m flowhn_jax.data.prepare`: the command `flowhn prepare`."""

from flowhn_jax.commands import prepare

if __name__ == "__main__":
    prepare.run()
