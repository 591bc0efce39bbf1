"""`python -m flowhn_jax.interop export|import`: `flowhn export` and `flowhn import`."""

from flowhn_jax.commands import main

if __name__ == "__main__":
    main.run(program="python -m flowhn_jax.interop", names=("export", "import"))
