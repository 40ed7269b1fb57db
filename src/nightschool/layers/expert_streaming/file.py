"""Experts in a file, a fixed number of which is in memory at a time.

What is only read is computed with where the kernel keeps the file's pages, mapped into memory; what is changed is read into a buffer, and written
from there. The kernel reads ahead what comes next, and writes to the disk behind. Measured, in nanoseconds a byte of the
processor's time, of a file of ext4 in the page cache: 0.003 to map, 0.04 to read into a buffer, 0.06 to write from it, and 0.5 for changing what
is mapped, as each page that was on the disk already is a fault of its own.

The file has no name. Nobody can cut it off, exchange it or forget it on the disk, and whatever ends this process gives its
room back; a run that was killed makes it anew from its last checkpoint. All of its room is taken at once, so that a full disk is
found before the first step.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from nightschool.errors import Damaged, DiskFull
from nightschool.layers.expert_streaming.ahead import ReadAhead, blocks_read
from nightschool.layers.expert_streaming.kept import Kept, LastUsed
from nightschool.layers.expert_streaming.record import Record, RecordLayout
from nightschool.layers.expert_streaming.store import ExpertStore, Visit
from nightschool.store.atomic import room_needed
from nightschool.units import format_bytes

PAGE_BYTES = mmap.PAGESIZE
_LEFT_FREE_BYTES = 64 << 20
# Of Linux, from 5.14 on: page tables are filled at once, and what cannot be read is an error and no signal.
_POPULATE_READ = 22
# The kernel maps up to so much beside what is asked for.
_AROUND_BYTES = 64 << 10


class FileStore(ExpertStore):
    """Records in a file without a name; at most `resident` of them are in memory at a time, one of them to be changed."""

    def __init__(
        self,
        layout: RecordLayout,
        num_records: int,
        *,
        folder: Path,
        resident: int,
        name_of: Callable[[int], str] = str,
        kept: Kept | None = None,
    ) -> None:
        """Take the room.

        Args:
            layout: Of a record; aligned to pages.
            num_records: How many there are.
            folder: On whose disk the file lies.
            resident: How many records stay in memory.
            name_of: What a record is called in messages.
            kept: Which ones; those that had their turn last without it.

        Raises:
            DiskFull: If there is not enough room.
        """
        assert layout.alignment % PAGE_BYTES == 0
        assert resident > 1
        super().__init__(layout, num_records)
        self._name_of, self._folder = name_of, folder
        size = num_records * layout.stride
        free = shutil.disk_usage(folder).free
        if size + _LEFT_FREE_BYTES > free:
            raise DiskFull(
                f"The experts take {format_bytes(size)} on the disk of {folder}, and {format_bytes(free)} are free there. "
                "Make room, or write experts.tier: host, or fewer experts."
            )
        with room_needed(folder), tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._map = mmap.mmap(self._file, size)
        self._block = torch.frombuffer(memoryview(self._map), dtype=torch.uint8)
        self._populates = True
        self._most_mapped = resident - 1
        self._mapped = LastUsed() if kept is None else kept
        self._bytes = memoryview(mmap.mmap(-1, layout.stride))
        self._buffer = layout.views(torch.frombuffer(self._bytes, dtype=torch.uint8), layout.sections)
        self._ahead = ReadAhead(self._tell)
        # Pages that are written first come in large folios, which are mapped, read and written in a fifth of the time of single
        # pages, as reading ahead into an empty file would leave them.
        for index in range(num_records):
            self._store(Visit(index, writes=layout.sections))

    @property
    def host_bytes(self) -> int:
        return (1 + min(self._most_mapped, self.num_records)) * self.layout.stride

    @property
    def disk_bytes(self) -> int:
        return self.num_records * self.layout.stride

    @property
    def taken_disk_bytes(self) -> int:
        return self.disk_bytes

    def walk(self, visits: Iterable[Visit]) -> Iterator[tuple[int, Record]]:
        for visit in self._ahead.walk(visits):
            began = time.perf_counter()
            record = self._load(visit)
            self._moving_seconds += time.perf_counter() - began
            yield visit.index, record
            began = time.perf_counter()
            self._store(visit)
            self._moving_seconds += time.perf_counter() - began

    def _tell(self, visit: Visit) -> None:
        place = visit.index * self.layout.stride
        for offset, size in self.layout.runs(visit.reads):
            os.posix_fadvise(self._file, place + offset, size, os.POSIX_FADV_WILLNEED)

    def _load(self, visit: Visit) -> Record:
        place, read_before = visit.index * self.layout.stride, blocks_read()
        mapped = set(visit.reads) - set(visit.writes)
        if mapped:
            self._map_record(visit.index, mapped)
        for offset, size in self.layout.runs(set(visit.reads) & set(visit.writes)):
            done = 0
            while done < size:
                count = os.preadv(self._file, [self._bytes[offset + done : offset + size]], place + offset + done)
                if count == 0:
                    raise self._damaged(visit.index, "the file of experts has become shorter")
                done += count
        self._ahead.note(read_before)
        views = self.layout.views(self._block[place : place + self.layout.stride], mapped)
        return Record(views | {section: self._buffer[section] for section in visit.writes}, self.layout.cut)

    def _store(self, visit: Visit) -> None:
        place = visit.index * self.layout.stride
        with room_needed(self._folder):
            for offset, size in self.layout.runs(visit.writes):
                done = 0
                while done < size:
                    done += os.pwrite(self._file, self._bytes[offset + done : offset + size], place + offset + done)

    def _map_record(self, index: int, sections: set[str]) -> None:
        """Have sections in memory, and no more records than there may be."""
        is_there = index in self._mapped
        self._num_hits, self._num_misses = self._num_hits + is_there, self._num_misses + (not is_there)
        while not is_there and len(self._mapped) >= self._most_mapped:
            begin = self._mapped.let_go() * self.layout.stride
            end = min(begin + self.layout.stride + _AROUND_BYTES, self.disk_bytes)
            begin = max(0, begin - _AROUND_BYTES)
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)
        self._mapped.use(index)
        self._populate(index, sections)

    def _populate(self, index: int, sections: Iterable[str]) -> None:
        for offset, size in self.layout.runs(sections):
            try:
                if self._populates:
                    self._map.madvise(_POPULATE_READ, index * self.layout.stride + offset, size)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise self._damaged(index, os.strerror(error.errno or 0)) from error
                self._populates = False  # an older kernel
        if not self._populates and os.fstat(self._file).st_size < self.disk_bytes:
            raise self._damaged(index, "the file of experts has become shorter")

    def _damaged(self, index: int, what: str) -> Damaged:
        name = self._name_of(index)
        return Damaged(
            f"{name[0].upper()}{name[1:]} cannot be read from the disk of {self._folder}, or written to it: {what}. Check the disk, "
            "and go on with --resume latest, which makes the file of experts anew."
        )
