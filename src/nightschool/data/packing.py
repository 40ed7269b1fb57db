"""Which examples share a micro-batch: documents laid end to end, none padded and none split.

A plan is a pure function of the lengths and a few integers. The order comes from a hash of (seed, epoch, index) and
not from a random generator, so that it stays the same under any version of any library.
"""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt

WINDOW_EXAMPLES = 2048
"""Examples among which batches are filled: enough to fill well, few enough that an epoch stays shuffled."""


def plan_epoch(
    lengths_tokens: npt.NDArray[np.int64],
    *,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Say which examples are in which micro-batch of an epoch. Every example is in exactly one.

    Args:
        lengths_tokens: Tokens of each example.
        batch_size: Examples per micro-batch; the last one may have fewer.
        tokens_per_batch: In place of `batch_size`: fill each micro-batch with whole examples up to this many
            tokens. An example that is longer is alone in its own.
        seed: Of the run.
        epoch: From 0.

    Raises:
        ValueError: If not exactly one of `batch_size` and `tokens_per_batch` is given, or it is below 1.
    """
    size = batch_size if tokens_per_batch is None else tokens_per_batch
    if (batch_size is None) == (tokens_per_batch is None) or size is None or size < 1:
        raise ValueError(
            f"batch_size is {batch_size} and tokens_per_batch is {tokens_per_batch}; give one of them, at least 1"
        )
    order = shuffled(len(lengths_tokens), seed=seed, epoch=epoch)
    if tokens_per_batch is None:
        return [order[start : start + size].tolist() for start in range(0, len(order), size)]
    batches = _filled(order, lengths_tokens, tokens_per_batch)
    return [batches[i] for i in shuffled(len(batches), seed=seed, epoch=epoch, purpose=1).tolist()]


def shuffled(count: int, *, seed: int, epoch: int, purpose: int = 0) -> npt.NDArray[np.int64]:
    """A permutation of `range(count)`: indices sorted by their SplitMix64 hash (Steele et al. 2014)."""
    key = np.uint64(0)
    for part in (seed, epoch, purpose):
        key = _mixed(np.array([key ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF)], dtype=np.uint64))[0]
    hashes = _mixed(np.arange(count, dtype=np.uint64) + key)
    return np.argsort(hashes, kind="stable").astype(np.int64)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _filled(order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best fit, longest first, window by window; the emptiest batch of a window gets company from the next."""
    batches: list[list[int]] = []
    waiting: list[int] = []
    for start in range(0, len(order), WINDOW_EXAMPLES):
        filled = _best_fit(waiting + order[start : start + WINDOW_EXAMPLES].tolist(), lengths, capacity)
        filled.sort(key=lambda batch: -batch[0])
        waiting = filled.pop()[1]
        batches.extend(members for _, members in filled)
    return [*batches, waiting] if waiting else batches


def _best_fit(window: list[int], lengths: npt.NDArray[np.int64], capacity: int) -> list[tuple[int, list[int]]]:
    """Put each example, longest first, into the batch that it fills best. Returns (tokens, examples) per batch."""
    members: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, batch), sorted
    used: list[int] = []
    for index in sorted(window, key=lambda i: -int(lengths[i])):
        tokens = int(lengths[index])
        place = bisect.bisect_left(room, (tokens, -1))
        if place < len(room):
            free, batch = room.pop(place)
        else:
            free, batch = capacity, len(members)
            members.append([])
            used.append(0)
        members[batch].append(index)
        used[batch] += tokens
        if free - tokens > 0:
            bisect.insort(room, (free - tokens, batch))
    return list(zip(used, members, strict=True))
