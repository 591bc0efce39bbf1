"""The entry point of `python -m flowhn_jax.data.prepare`; see `commands.prepare`."""

from flowhn_jax.commands import prepare

if __name__ == "__main__":
    prepare.run()
