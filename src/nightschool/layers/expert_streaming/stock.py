"""Frozen experts that are read from the files of a stock folder where they lie: nothing is written, and nothing is read before it is needed.

A fixed number of them is in memory, each at an address of 64 bytes' alignment and with its matrices side by side, as on the other tiers.
They are read and not mapped, because stock files put a tensor at any multiple of 8 bytes, and the product of one fp32 row has other last bits
from an address that is no multiple of 16 (with MKL on AVX-512, for all shapes that were tried). So a file that is cut off or changed is an error and no signal,
and what is in memory already stays right.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nightschool.errors import Damaged
from nightschool.layers.expert_streaming.ahead import ReadAhead, blocks_read
from nightschool.layers.expert_streaming.kept import Kept, LastUsed
from nightschool.layers.expert_streaming.record import WEIGHTS, Record, RecordLayout
from nightschool.layers.expert_streaming.store import ExpertStore, Visit


class StockFile:
    """A file that experts are read from. It stays the one that was opened, whatever comes to its name."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            OSError: If it cannot be opened.
        """
        self.path = path
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.handle)
        self._state = self._now()

    def read(self, begin: int, buffer: memoryview) -> None:
        """Fill a buffer from there.

        Raises:
            Damaged: If the file is not what it was when it was opened.
        """
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self.handle, [buffer[done:]], begin + done)
                if count == 0:
                    raise Damaged(f"{self.path} was cut off while experts were read from it. {_REMEDY}")
                done += count
        except OSError as error:
            raise Damaged(f"{self.path} cannot be read: {error.strerror}. Check the disk. {_REMEDY}") from error
        if self._now() != self._state:
            raise Damaged(f"{self.path} was changed while experts were read from it. {_REMEDY}")

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self.handle)
        return state.st_size, state.st_mtime_ns


_REMEDY = "Restore the folder, and load the model again."


@dataclass(frozen=True)
class Piece:
    """Numbers of an expert that lie in a row: which of the files, from which byte on, how many, and in which format."""

    file: StockFile
    begin: int
    numbers: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.numbers * self.dtype.itemsize


class StockStore(ExpertStore):
    """Records of weights that are only read, at most `resident` of which are in memory at a time."""

    def __init__(
        self,
        layout: RecordLayout,
        records: Sequence[Sequence[Piece]],
        *,
        resident: int,
        name_of: Callable[[int], str] = str,
        kept: Kept | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            layout: Of a record in memory, in whose `dtype` the numbers of its only section are.
            records: The pieces of each, in the order of its numbers there.
            resident: How many records stay in memory.
            name_of: What a record is called in messages.
            kept: Which ones; those that had their turn last without it.
        """
        assert layout.sections == (WEIGHTS,)
        assert all(sum(piece.numbers for piece in record) == layout.numbers for record in records)
        super().__init__(layout, len(records))
        self._pieces, self._name_of = records, name_of
        self._num_slots = min(resident, len(records))
        self._slots = torch.empty(self._num_slots * layout.stride, dtype=torch.uint8)
        self._free = [*range(self._num_slots)]
        self._slot_of: dict[int, int] = {}
        self._kept = LastUsed() if kept is None else kept
        widest = (piece.num_bytes for record in records for piece in record if piece.dtype != layout.dtype)
        self._other_format = torch.empty(max(widest, default=0), dtype=torch.uint8)
        self._is_finite = bytearray(len(records))
        self._ahead = ReadAhead(self._tell)

    @property
    def host_bytes(self) -> int:
        return self._num_slots * self.layout.stride

    @property
    def disk_bytes(self) -> int:
        return sum(piece.num_bytes for record in self._pieces for piece in record)

    @property
    def taken_disk_bytes(self) -> int:
        return 0

    def walk(self, visits: Iterable[Visit]) -> Iterator[tuple[int, Record]]:
        for visit in self._ahead.walk(visits):
            assert not visit.writes, "experts of a stock folder are frozen"
            began = time.perf_counter()
            record = self._load(visit.index)
            self._moving_seconds += time.perf_counter() - began
            yield visit.index, record

    def _tell(self, visit: Visit) -> None:
        if visit.index not in self._slot_of:
            for piece in self._pieces[visit.index]:
                os.posix_fadvise(piece.file.handle, piece.begin, piece.num_bytes, os.POSIX_FADV_WILLNEED)

    def _load(self, index: int) -> Record:
        slot = self._slot_of.get(index)
        if slot is not None:
            self._num_hits += 1
        else:
            self._num_misses += 1
            if not self._free:
                self._free.append(self._slot_of.pop(self._kept.let_go()))
            read_before = blocks_read()
            self._read(index, self._section(self._free[-1]))
            self._ahead.note(read_before)
            slot = self._slot_of[index] = self._free.pop()
        self._kept.use(index)
        return Record({WEIGHTS: self._section(slot)}, self.layout.cut)

    def _section(self, slot: int) -> Tensor:
        begin = slot * self.layout.stride
        return self.layout.views(self._slots[begin : begin + self.layout.stride], (WEIGHTS,))[WEIGHTS]

    def _read(self, index: int, section: Tensor) -> None:
        """Let a section be the record, whose numbers are looked at when they are read for the first time."""
        begin = 0
        for piece in self._pieces[index]:
            numbers = section[begin : begin + piece.numbers]
            begin += piece.numbers
            if piece.dtype == section.dtype:
                piece.file.read(piece.begin, numbers.view(torch.uint8).numpy().data)
            else:
                raw = self._other_format[: piece.num_bytes]
                piece.file.read(piece.begin, raw.numpy().data)
                numbers.copy_(raw.view(piece.dtype))
        if not self._is_finite[index]:
            # The least and the largest are NaN where any is: a twelfth of the time of looking at each.
            if not bool(torch.isfinite(torch.stack(torch.aminmax(section))).all()):
                raise Damaged(
                    f"The weights of {self._name_of(index)} of the base hold NaN or infinity. Fetch it again."
                )
            self._is_finite[index] = 1
