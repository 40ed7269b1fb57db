"""How one expert lies in a store: its sections, each aligned, at a fixed stride from record to record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

WEIGHTS = "weights"
FIRST_MOMENT = "first_moment"
SECOND_MOMENT = "second_moment"
GRADIENT = "gradient"
# In this order, so that all that an update changes is one run of bytes.
UPDATED = (WEIGHTS, FIRST_MOMENT, SECOND_MOMENT)
LEARNING = (*UPDATED, GRADIENT)


Cut = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RecordLayout:
    """Sections of `numbers` elements of `dtype` each; every one begins at a multiple of `alignment` bytes.

    `cut` makes the two matrices of an expert of a section.
    """

    sections: tuple[str, ...]
    numbers: int
    dtype: torch.dtype
    alignment: int
    cut: Cut

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

    def views(self, buffer: Tensor, sections: Iterable[str]) -> dict[str, Tensor]:
        """Sections of a record that lies in a buffer of `stride` bytes."""
        size = self.numbers * self.dtype.itemsize
        return {s: buffer[self.offset(s) : self.offset(s) + size].view(self.dtype) for s in sections}

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
    """The sections of one expert, flat and cut into matrices, wherever each of them lies."""

    def __init__(self, sections: Mapping[str, Tensor], cut: Cut) -> None:
        self._sections = sections
        self._cut = cut
        self._matrices: dict[str, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, section: str) -> Tensor:
        return self._sections[section]

    def copy(self) -> Record:
        """The same in memory of its own."""
        return Record({name: section.clone() for name, section in self._sections.items()}, self._cut)

    def matrices(self, section: str) -> tuple[Tensor, Tensor]:
        """A section as the two matrices of the expert, without a copy."""
        found = self._matrices.get(section)
        if found is None:
            found = self._matrices[section] = self._cut(self._sections[section])
        return found
