"""Reading a set back, independently of the code under test."""

import os
import pathlib

import numpy as np

# For processes that import the code under test, whatever folder they run in.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}


def windows(prepared, split):
    """Return all windows of a split: tokens and segment ids, [W, N+1]."""
    source = prepared.windows(split)
    rows = [source[i] for i in range(len(source))]
    return tuple(np.stack([row[key] for row in rows]) for key in ("tokens", "segment_ids"))


def documents(prepared, split):
    """Return the ids of each document in a split, recovered from its windows."""
    tokens, segments = windows(prepared, split)
    stream = [tokens[0, 0]]
    for row, ids in zip(tokens, segments, strict=True):
        stream += [token for token, segment in zip(row[1:], ids[1:], strict=True) if segment]
    assert stream[0] == stream[-1] == prepared.eot_id
    found = []
    for token in stream[:-1]:
        if token == prepared.eot_id:
            found.append([])
        else:
            found[-1].append(int(token))
    return found


def content(folder):
    """Return the content of a folder's files by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
