import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flowhn_jax.data.packing import Packer, target_mask

EOT = 9
DOCUMENTS = st.lists(st.lists(st.integers(0, 8), max_size=30), min_size=1, max_size=12)


def pack(documents, context, take_every):
    """Windows of the documents, whose ids are added in bits and taken now and then."""
    packer = Packer(context, EOT)
    taken = []
    count = 0
    for ids in documents:
        packer.start_document()
        for start in range(0, len(ids), 4):
            packer.add(np.array(ids[start : start + 4], np.int32))
            count += 1
            if count % take_every == 0:
                taken.append(packer.take())
    taken.append(packer.finish())
    tokens, segments = (np.concatenate(parts) for parts in zip(*taken, strict=True))
    return packer, tokens, segments


@given(DOCUMENTS, st.integers(1, 17), st.integers(1, 9))
def test_windows_cover_the_stream_exactly(documents, context, take_every):
    packer, tokens, segments = pack(documents, context, take_every)
    stream, owners = [], []
    for number, ids in enumerate([*documents, []]):  # the last one is the closing EOT
        stream += [EOT, *ids]
        owners += [number] * (1 + len(ids))
    assert packer.targets == len(stream) - 1
    assert packer.documents == len(documents)
    assert tokens.shape == segments.shape == (-(-packer.targets // context), context + 1)

    mask = target_mask(segments)
    assert mask.shape == (len(tokens), context)
    assert mask.sum() == packer.targets
    assert tokens[:, 1:][mask].tolist() == stream[1:]  # each token but the first is a target once
    assert (tokens[:, 1:][~mask] == EOT).all()
    assert (np.diff(mask.ravel().astype(int)) <= 0).all()  # padding is at the end alone

    for row in range(len(tokens)):
        here = slice(row * context, row * context + context + 1)
        expected = stream[here]
        numbers = [owner - owners[here][0] + 1 for owner in owners[here]]
        assert tokens[row, : len(expected)].tolist() == expected
        assert segments[row].tolist() == numbers + [0] * (context + 1 - len(expected))


@given(DOCUMENTS, st.integers(1, 17))
def test_windows_do_not_depend_on_when_they_are_taken(documents, context):
    _, *often = pack(documents, context, 1)
    _, *once = pack(documents, context, 10**6)
    for a, b in zip(often, once, strict=True):
        assert np.array_equal(a, b)
