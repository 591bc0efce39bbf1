"""`python -m flowhn_jax COMMAND`: the same as `flowhn COMMAND`."""

from flowhn_jax.commands import main

if __name__ == "__main__":
    main.run(program="python -m flowhn_jax")
