"""The kernel is told of the next records before their turn, where it has to read from a disk."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from nightschool.layers.expert_streaming.store import Visit

# Records that it is told of before their turn.
_AHEAD = 2
# For so many more records it is told, after one that was not in the page cache.
_COLD_VISITS = 256


class ReadAhead:
    """Tells of the next records, if a disk was waited for lately: asking costs as much as mapping a record does."""

    def __init__(self, tell: Callable[[Visit], None]) -> None:
        self._tell, self._cold_for = tell, 0

    def walk(self, visits: Iterable[Visit]) -> Iterator[Visit]:
        """The visits in order."""
        left, ahead = iter(visits), deque[Visit]()
        for visit in islice(left, _AHEAD):
            self._announce(visit)
            ahead.append(visit)
        while ahead:
            yield ahead.popleft()
            for visit in islice(left, 1):
                self._announce(visit)
                ahead.append(visit)

    def _announce(self, visit: Visit) -> None:
        if self._cold_for:
            self._tell(visit)

    def note(self, read_before: int) -> None:
        """A record was loaded; `blocks_read` was so much before."""
        self._cold_for = _COLD_VISITS if blocks_read() > read_before else max(0, self._cold_for - 1)


def blocks_read() -> int:
    """Blocks that this thread had to wait for a disk for."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
