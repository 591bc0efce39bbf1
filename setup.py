"""Add the recipes of configs/ to the installed package, as `flowhn_jax.configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["flowhn_jax*", "kernels*"]), "flowhn_jax.configs"],
    package_dir={"flowhn_jax.configs": "configs"},
)
