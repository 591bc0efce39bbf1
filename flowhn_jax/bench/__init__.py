"""Benchmarks, each a subcommand of `python -m flowhn_jax.bench`."""
