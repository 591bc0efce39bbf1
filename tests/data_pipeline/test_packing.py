import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flowhn_jax.data.packing import Packer, target_mask
from flowhn_jax.data.shards import unsigned_dtype

BOS, EOT = 10, 9
DOCUMENTS = st.lists(st.lists(st.integers(0, 8), max_size=30), min_size=1, max_size=12)


def pack(documents, context, take_every, bos_id=None):
    """Pack documents, adding four ids at a time; return the packer, tokens and segment ids."""
    packer = Packer(context, EOT, bos_id)
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
    # Each token except the first is a target once.
    assert tokens[:, 1:][mask].tolist() == stream[1:]
    assert (tokens[:, 1:][~mask] == EOT).all()
    assert (np.diff(mask.ravel().astype(int)) <= 0).all()  # padding is only at the end

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


@given(DOCUMENTS, st.integers(1, 17), st.integers(1, 9))
def test_bos_begins_each_document_and_is_never_a_target(documents, context, take_every):
    packer, tokens, segments = pack(documents, context, take_every, BOS)
    stream, owners = [], []
    for number, ids in enumerate(documents):
        stream += [BOS, *ids, EOT]
        owners += [number] * (2 + len(ids))
    expected = [token for ids in documents for token in (*ids, EOT)]
    assert packer.targets == len(expected)
    assert packer.documents == len(documents)
    assert tokens.shape == segments.shape == (-(-(len(stream) - 1) // context), context + 1)
    assert segments.max() <= context + 2  # fits the dtype of the records
    mask = target_mask(segments)
    assert tokens[:, 1:][mask].tolist() == expected
    assert mask.sum() == packer.targets
    for row in range(len(tokens)):
        here = slice(row * context, row * context + context + 1)
        numbers = [1 + 2 * (owner - owners[here][0]) for owner in owners[here]]
        filled = context + 1 - len(numbers)
        assert tokens[row].tolist() == stream[here] + [EOT] * filled
        assert segments[row].tolist() == numbers + [0] * filled


@given(st.integers(1, 300))
def test_segment_ids_with_bos_fit_the_dtype_of_the_records(context):
    """The ids are largest if every document is empty, that is two tokens long."""
    packer, _, segments = pack([[]] * (context + 2), context, 1, BOS)
    assert packer.targets == context + 2
    assert segments.max() <= np.iinfo(unsigned_dtype(context + 2)).max
    assert segments.max() <= context + 2 - (context % 2 == 0)
