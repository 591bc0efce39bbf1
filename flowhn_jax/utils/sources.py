"""Where the code is."""

import pathlib

# The folder that has the packages `flowhn_jax` and `kernels`: a checkout, or site-packages.
ROOT = pathlib.Path(__file__).parents[2]
