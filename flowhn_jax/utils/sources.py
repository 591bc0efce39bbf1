"""Where the code is."""

import pathlib

# The folder that holds the packages `flowhn_jax` and `kernels`: a checkout, or site-packages.
ROOT = pathlib.Path(__file__).parents[2]
