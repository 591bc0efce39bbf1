"""What an instruction of a train step is for."""

from collections.abc import Sequence

from flowhn_jax.aot.roofline.timeline import Entry

PRODUCTS = "products"
HEAD = "head and loss"
ATTENTION = "attention"
SCAN = "scan"
OPTIMIZER = "optimizer"
COLLECTIVES = "exposed collectives"
MOVES = "copies and relayouts"
OTHER = "other elementwise"
CATEGORIES = (PRODUCTS, HEAD, ATTENTION, SCAN, OPTIMIZER, COLLECTIVES, MOVES, OTHER)

_FOLDERS = {
    "kernels/cross_entropy/": HEAD,
    "kernels/attention/": ATTENTION,
    "kernels/selective_scan/": SCAN,
    "kernels/ssd/": SCAN,
}
_ATTENTION_LAYER = "flowhn_jax/layers/attention.py"
_STEP = "flowhn_jax/training/step.py"


def category(entry: Entry, files: Sequence[str], *, only_moves: bool) -> str:
    """Return the category of an entry.

    What a kernel's package computes, copies included, belongs to the kernel's category, and so does
    what the attention layer computes around its kernel; projections are products.

    Args:
      entry: the entry of the timeline.
      files: the files of the project, on the stack of the entry's instruction.
      only_moves: whether the instruction computes nothing.
    """
    if entry.limit == "links" and not entry.work.is_async:
        return COLLECTIVES
    for file in files:
        for folder, name in _FOLDERS.items():
            if file.startswith(folder):
                return name
    if entry.work.flops:
        return PRODUCTS
    if _ATTENTION_LAYER in files:
        return ATTENTION
    if only_moves:
        return MOVES
    # Of the step's own lines only the gradients are under autodiff.
    autodiff = "jvp(" in entry.instruction.attributes
    return OPTIMIZER if files[:1] == [_STEP] and not autodiff else OTHER
