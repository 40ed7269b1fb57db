"""How one expert lies in a store: its sections, each aligned, at a fixed stride from record to record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

WEIGHTS = "weights"
FIRST_MOMENT = "first_moment"
SECOND_MOMENT = "second_moment"
GRADIENT = "gradient"
# In this order, so that all that an update writes is one run of bytes, and all that it reads is one, too.
LEARNING = (WEIGHTS, FIRST_MOMENT, SECOND_MOMENT, GRADIENT)


@dataclass(frozen=True)
class RecordLayout:
    """Sections of `numbers` elements of `dtype` each; every one begins at a multiple of `alignment` bytes."""

    sections: tuple[str, ...]
    numbers: int
    dtype: torch.dtype
    alignment: int

    @cached_property
    def section_bytes(self) -> int:
        """What a section takes, with the gap to the next one."""
        size = self.numbers * self.dtype.itemsize
        return size + -size % self.alignment

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return len(self.sections) * self.section_bytes

    def offset(self, section: str) -> int:
        """Where a section begins in its record."""
        return self.sections.index(section) * self.section_bytes

    def runs(self, sections: Iterable[str]) -> Iterator[tuple[int, int]]:
        """Offset and bytes of the fewest runs that hold these sections."""
        begin = end = -1
        for offset in sorted(self.offset(section) for section in set(sections)):
            if offset != end:
                if begin >= 0:
                    yield begin, end - begin
                begin = offset
            end = offset + self.section_bytes
        if begin >= 0:
            yield begin, end - begin


class Record:
    """The sections of one expert as flat tensors over a buffer, and which of them were changed since it was loaded."""

    def __init__(self, layout: RecordLayout, buffer: Tensor) -> None:
        """`buffer` has `layout.stride` bytes."""
        self._sections = {
            section: buffer[layout.offset(section) :][: layout.numbers * layout.dtype.itemsize].view(layout.dtype)
            for section in layout.sections
        }
        self.changed: set[str] = set()

    def __getitem__(self, section: str) -> Tensor:
        return self._sections[section]
