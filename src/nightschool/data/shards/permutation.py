"""The order of sequences: a permutation that is computed and not stored, so any place in it is found at once.

A permutation array of 50 billion tokens would take 0.4 GB and minutes to make; this one takes four integers. It is a
Feistel network over the smallest square domain that holds the indices; what falls outside is sent through again until
it falls inside (cycle walking), which keeps it a bijection. (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_ROUNDS = 6
_U64 = np.uint64


class Permutation:
    """A bijection of 0 … size - 1 onto itself, chosen by a key. Equal arguments give equal permutations everywhere."""

    def __init__(self, size: int, key: str) -> None:
        assert size >= 1, "an empty set has no order"
        self.size = size
        self._half_bits = max(1, -(-(size - 1).bit_length() // 2))
        digest = hashlib.shake_128(f"{key}/{size}".encode()).digest(8 * _ROUNDS)
        self._keys = np.frombuffer(digest, dtype="<u8").astype(_U64)

    def __call__(self, indices: Indices) -> Indices:
        """Where each of `indices` [N] goes, [N]."""
        out = self._once(indices.astype(_U64))
        outside = np.flatnonzero(out >= _U64(self.size))
        while len(outside):
            out[outside] = self._once(out[outside])
            outside = outside[out[outside] >= _U64(self.size)]
        return out.astype(np.int64)

    def _once(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        shift, mask = _U64(self._half_bits), _U64((1 << self._half_bits) - 1)
        left, right = x >> shift, x & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << shift) | right


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every bit of the input moves every bit of the output."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
        return x ^ (x >> _U64(31))


class SequenceOrder:
    """Which sequence of which shard comes at which place of an epoch.

    Shards are shuffled and cut into groups; the sequences of a group are shuffled among themselves. So at any time only
    the shards of one group have to be at hand, and still every sequence comes once in an epoch. Nothing here knows of
    processes or batch sizes: the order is the same for any number of them.

    Args:
        counts: Sequences of each shard.
        seed: Of the order.
        group_shards: Shards that are shuffled among each other.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, group_shards: int) -> None:
        assert group_shards >= 1, "a group has a shard"
        self._counts = np.asarray(counts, dtype=np.int64)
        self._seed, self._group_shards = seed, group_shards
        self.num_sequences = int(self._counts.sum())
        self._epoch = -1
        self._groups: list[Indices] = []
        self._group_ends = np.zeros(0, dtype=np.int64)
        self._within: dict[int, Permutation] = {}

    def locate(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        """The shards [N] and the sequences in them [N] at the `places` [N] of an epoch.

        Raises:
            IndexError: If the epoch has no such place.
        """
        if len(places) and not (places.min() >= 0 and places.max() < self.num_sequences):
            raise IndexError(f"an epoch has {self.num_sequences} sequences, so there is no place {int(places.max())}")
        self._enter(epoch)
        shards, sequences = np.empty_like(places), np.empty_like(places)
        groups = np.searchsorted(self._group_ends, places, side="right")
        for group in np.unique(groups):
            here = groups == group
            members = self._groups[group]
            ends = np.cumsum(self._counts[members])
            begin = self._group_ends[group] - ends[-1]
            shuffled = self._permutation(epoch, int(group), int(ends[-1]))(places[here] - begin)
            member = np.searchsorted(ends, shuffled, side="right")
            shards[here] = members[member]
            sequences[here] = shuffled - (ends - self._counts[members])[member]
        return shards, sequences

    def group_of(self, epoch: int, place: int) -> int:
        """The number of the group of shards that this place is in."""
        self._enter(epoch)
        return int(np.searchsorted(self._group_ends, place, side="right"))

    def upcoming_shards(self, epoch: int, place: int) -> list[int]:
        """The shards from this place on to the end of the epoch, in the order in which they are needed."""
        group = self.group_of(epoch, place)
        return [int(shard) for members in self._groups[group:] for shard in members]

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        used = np.flatnonzero(self._counts)
        order = used[Permutation(len(used), f"shards {self._seed} {epoch}")(np.arange(len(used)))]
        self._groups = [order[at : at + self._group_shards] for at in range(0, len(order), self._group_shards)]
        self._group_ends = np.cumsum([int(self._counts[members].sum()) for members in self._groups])
        self._within, self._epoch = {}, epoch

    def _permutation(self, epoch: int, group: int, size: int) -> Permutation:
        if group not in self._within:
            self._within = {group: Permutation(size, f"sequences {self._seed} {epoch} {group}")}
        return self._within[group]
