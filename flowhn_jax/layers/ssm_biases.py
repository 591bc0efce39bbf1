"""Which parts of a state-space mixer have a bias."""

from typing import NamedTuple


class SSMBiases(NamedTuple):
    """Whether the convolution and the projections of a mixer have a bias."""

    conv: bool = True
    in_proj: bool = False
    out_proj: bool = False


USUAL = SSMBiases()  # those of the papers
