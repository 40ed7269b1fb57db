"""Which records stay in memory when another one needs the room."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class Kept(Protocol):
    """The records that are in memory."""

    def __contains__(self, index: object) -> bool: ...

    def __len__(self) -> int: ...

    def use(self, index: int) -> None:
        """A record has its turn, and is in memory from now on."""
        ...

    def let_go(self) -> int:
        """Take the one that is missed least out, and return it."""
        ...


class LastUsed(Kept):
    """Those that had their turn last: a training step has all of them in a row, and comes back the way it went."""

    def __init__(self) -> None:
        self._records: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, index: object) -> bool:
        return index in self._records

    def __len__(self) -> int:
        return len(self._records)

    def use(self, index: int) -> None:
        self._records[index] = None
        self._records.move_to_end(index)

    def let_go(self) -> int:
        return self._records.popitem(last=False)[0]


class MostUsed(Kept):
    """Those that had the most turns, of which old ones count less and less.

    Whoever answers goes through all layers for each token, so that the one that had its turn last is the one that is needed
    last: with room for fewer than a token needs, the others would leave just before they come back. So of records with as many
    turns, the one that had its turn last leaves.
    """

    # Turns count half as much after so many of each record that there is room for.
    _HALF_LIFE = 64

    def __init__(self, room: int) -> None:
        self._halving = self._HALF_LIFE * room
        self._turn = 0
        self._counts: dict[int, int] = {}
        self._records: dict[int, int] = {}

    def __contains__(self, index: object) -> bool:
        return index in self._records

    def __len__(self) -> int:
        return len(self._records)

    def use(self, index: int) -> None:
        self._turn += 1
        if self._turn % self._halving == 0:
            self._counts = {one: count // 2 for one, count in self._counts.items() if count > 1 or one in self._records}
        self._counts[index] = self._counts.get(index, 0) + 1
        self._records[index] = self._turn

    def let_go(self) -> int:
        least = min(self._records, key=lambda one: (self._counts[one], -self._records[one]))
        del self._records[least]
        return least
