"""The last resort: a look at the bits of every entry, for a question whose subject nothing else found."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

# Slots of one pass: counts and words of so many stay in the cache of a core.
_CHUNK = 1 << 15


def nearest(query: Hashes, hashes: Hashes, wanted: int) -> npt.NDArray[np.int32]:
    """The `wanted` columns of `hashes` [4, n] that differ from `query` [4] in the fewest bits; more where the last ones tie."""
    words, total = hashes.shape
    distances = np.empty(total, np.uint16)
    for begin in range(0, total, _CHUNK):
        part = slice(begin, begin + _CHUNK)
        counted = np.bitwise_count(hashes[0, part] ^ query[0]).astype(np.uint16)
        for word in range(1, words):
            counted += np.bitwise_count(hashes[word, part] ^ query[word])
        distances[part] = counted
    held = np.cumsum(np.bincount(distances, minlength=64 * words + 1))
    farthest = int(np.searchsorted(held, min(wanted, total)))
    return np.flatnonzero(distances <= farthest).astype(np.int32)
