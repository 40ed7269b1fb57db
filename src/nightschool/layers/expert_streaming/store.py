"""What holds the records of experts, wherever it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from nightschool.layers.expert_streaming.record import Record, RecordLayout


@dataclass(frozen=True)
class Visit:
    """A record that will be looked at: which of its sections are read, and which are changed, whether read or not."""

    index: int
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


class ExpertStore(ABC):
    """Records by number. All of them begin as zeros, where they can be changed."""

    def __init__(self, layout: RecordLayout, num_records: int) -> None:
        self.layout: Final = layout
        self.num_records: Final = num_records
        self._num_hits = self._num_misses = 0
        self._moving_seconds = 0.0

    @property
    @abstractmethod
    def host_bytes(self) -> int:
        """Bytes of the host's memory that it holds."""

    @property
    @abstractmethod
    def disk_bytes(self) -> int:
        """Bytes of a disk where the records lie."""

    @property
    @abstractmethod
    def taken_disk_bytes(self) -> int:
        """Those of them that it has taken for itself; none where records are read from a file that was there."""

    @property
    def turns(self) -> tuple[int, int]:
        """How many times a record that was only read was in memory when its turn came, and how many times it was not."""
        return self._num_hits, self._num_misses

    @property
    def moving_seconds(self) -> float:
        """How long it took so far to load records to where they are computed with, and to store them."""
        return self._moving_seconds

    @abstractmethod
    def walk(self, visits: Iterable[Visit]) -> Iterator[tuple[int, Record]]:
        """Yield records in order, one at a time, to be looked at and changed until the next one is asked for.

        A section that is changed and not read may hold anything at first. One walk at a time, to its end: of one that is broken off,
        the last record's changes may be lost.

        Raises:
            Damaged: If a record cannot be had.
            DiskFull: If there is no room for a change.
        """
