"""Which entries name a token in their subject or relation: the way to names that no encoder knows.

Lists of slots for each token, sorted, with what came since in short lists beside them. It needs no training, so it works on the
first day.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]
Tokens = npt.NDArray[np.int32]

# Tokens of a question that are looked up, the rarest first, and entries that are looked at in all: what is in every second
# entry tells nothing.
_MOST_TOKENS = 24
_MOST_ENTRIES = 1 << 16
_CHUNK = 1 << 17


class Postings:
    """`tokens` [t] ascending, `starts` [t + 1], `slots` of each token."""

    def __init__(self, tokens: Tokens, starts: Slots, slots: Slots) -> None:
        self.tokens, self.starts, self.slots = tokens, starts, slots
        self._new: dict[int, array[int]] = {}
        self._scores = np.zeros(0, np.float32)

    @classmethod
    def of(cls, slots: Slots, tokens: Tokens, lengths: npt.NDArray[np.integer]) -> Postings:
        """Of the first `lengths` [n] tokens of each line [n, L], where `slots` [n] ascend."""
        width = tokens.shape[1]
        pairs = [np.empty(0, np.int64)]
        for begin in range(0, len(slots), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            named = np.arange(width) < lengths[part][:, None]
            owners = np.broadcast_to(slots[part][:, None], named.shape)[named]
            pairs.append(_pairs(tokens[part][named], owners))
        return cls._of_pairs(np.concatenate(pairs))

    @classmethod
    def _of_pairs(cls, pairs: npt.NDArray[np.int64]) -> Postings:
        both = np.unique(pairs)
        names = (both >> 32).astype(np.int32)
        distinct, firsts = np.unique(names, return_index=True)
        starts = np.append(firsts, len(names)).astype(np.int32)
        return cls(distinct, starts, (both & 0xFFFFFFFF).astype(np.int32))

    def merged(self, other: Postings | None = None) -> Postings:
        """All of it, and of another, in lists without anything beside them."""
        parts = [part for one in (self, other) if one is not None for part in one._all_pairs()]
        return Postings._of_pairs(np.concatenate(parts))

    def _all_pairs(self) -> list[npt.NDArray[np.int64]]:
        listed = _pairs(np.repeat(self.tokens, np.diff(self.starts)), self.slots)
        return [listed, *(_pairs(np.full(len(new), token), np.array(new)) for token, new in self._new.items())]

    def append(self, slot: int, tokens: Iterable[int]) -> None:
        """Enter a slot under each of `tokens`."""
        new = self._new
        for token in set(tokens):
            found = new.get(token)
            if found is None:
                new[token] = array("i", (slot,))
            else:
                found.append(slot)

    def remove(self, slot: int) -> None:
        """Forget a slot, for good. Takes as long as reading all lists."""
        for token, new in list(self._new.items()):
            if slot in new:
                kept = array("i", (one for one in new if one != slot))
                self._new[token] = kept
        doomed = self.slots == slot
        if doomed.any():
            self.starts = self.starts - np.append(0, np.cumsum(doomed))[self.starts].astype(np.int32)
            self.slots = self.slots[~doomed]

    def of_token(self, token: int) -> Slots:
        """The slots that name a token; one may stand there twice."""
        begin, end = self._range(token)
        listed = self.slots[begin:end]
        new = self._new.get(token)
        return listed if new is None else np.concatenate([listed, np.array(new, np.int32)])

    def best(self, tokens: Iterable[int], num_slots: int, wanted: int) -> Slots:
        """The slots that name the most, and the rarest, of a question's tokens (by the sum of inverse document frequencies).

        Args:
            tokens: Of a question.
            num_slots: How many slots there are in all.
            wanted: How many come back at most.

        Returns:
            Slots in no order.
        """
        lists = [found for token in set(tokens) if len(found := self.of_token(token))]
        lists.sort(key=len)
        if len(self._scores) < num_slots:
            self._scores = np.zeros(num_slots + num_slots // 8 + 1024, np.float32)
        scores, budget = self._scores, _MOST_ENTRIES
        looked_at: list[Slots] = []
        for found in lists[:_MOST_TOKENS]:
            if looked_at and len(found) > budget:
                break
            budget -= len(found)
            scores[found] += np.float32(np.log1p(num_slots / len(found)))
            looked_at.append(found)
        if not looked_at:
            return np.empty(0, np.int32)
        slots = np.concatenate(looked_at)
        reached = scores[slots]
        scores[slots] = 0
        # A slot stands here once for each of its tokens, each time with the same score.
        most = wanted * len(looked_at)
        if len(slots) > most:
            picked = np.argpartition(-reached, most - 1)[:most]
            slots, reached = slots[picked], reached[picked]
        slots, first = np.unique(slots, return_index=True)
        if len(slots) > wanted:
            slots = slots[np.argpartition(-reached[first], wanted - 1)[:wanted]]
        return slots

    def _range(self, token: int) -> tuple[int, int]:
        place = int(np.searchsorted(self.tokens, token))
        if place == len(self.tokens) or self.tokens[place] != token:
            return 0, 0
        return int(self.starts[place]), int(self.starts[place + 1])


def _pairs(tokens: npt.NDArray[np.integer], slots: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    pairs: npt.NDArray[np.int64] = (tokens.astype(np.int64) << 32) | slots.astype(np.int64)
    return pairs
