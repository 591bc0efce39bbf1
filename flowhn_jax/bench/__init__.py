"""Benchmarks: `python -m flowhn_jax.bench kernels` and `branches`."""
