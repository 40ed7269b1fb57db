"""What holds the records of experts, wherever it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from nightschool.layers.expert_streaming.record import Record, RecordLayout


@dataclass(frozen=True)
class Visit:
    """A record that will be looked at, and which of its sections must be there then."""

    index: int
    sections: tuple[str, ...]


class ExpertStore(Protocol):
    """Records by number. All of them begin as zeros."""

    @property
    def layout(self) -> RecordLayout: ...

    @property
    def num_records(self) -> int: ...

    @property
    def host_bytes(self) -> int:
        """Bytes of the host's memory that it holds."""
        ...

    @property
    def disk_bytes(self) -> int:
        """Bytes of a disk that it holds."""
        ...

    def walk(self, visits: Iterable[Visit]) -> Iterator[tuple[int, Record]]:
        """Yield records in order, one at a time; what is in `changed` when the next one is asked for is kept.

        A record may be looked at until the next one is asked for. No walk has the same record twice, and there is one walk at a
        time.

        Raises:
            Damaged: If what is read is not what was written.
            DiskFull: If there is no room to keep a change.
        """
        ...

    def settle(self) -> None:
        """Wait until all changes are kept. Raises as `walk` does."""
        ...
