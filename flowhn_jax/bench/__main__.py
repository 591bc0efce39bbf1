"""`python -m flowhn_jax.bench`: the command `flowhn bench`."""

from flowhn_jax.commands import bench

if __name__ == "__main__":
    bench.run()
