"""Experts in a file, of which a fixed number is in memory: read ahead of whoever walks, written behind.

The file has no name. Nobody can cut it off, exchange it or forget it on the disk, and whatever ends this process gives its
room back; a run that was killed makes it anew from its last checkpoint. All of its room is taken at once, so that a full disk is
found before the first step.

One thread reads and writes in the order in which it was asked to, so a record is read as it was written last, and a buffer is
filled only after what was in it has left.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nightschool.errors import Damaged, DiskFull
from nightschool.layers.expert_streaming.record import Record, RecordLayout
from nightschool.layers.expert_streaming.store import ExpertStore, Visit
from nightschool.store.atomic import room_needed
from nightschool.units import format_bytes

# Disks and kernels lose bytes by the page, so the beginnings of all pages are enough to find it: a sum over all bytes would
# take longer than the products.
PAGE_BYTES = 4096
_SAMPLE_BYTES = 64
_LEFT_FREE_BYTES = 64 << 20


class _Slot(NamedTuple):
    """A buffer that a record is read into."""

    record: Record
    bytes: memoryview


class FileStore(ExpertStore):
    """Records in a file without a name; `resident` of them are in memory at a time."""

    def __init__(
        self,
        layout: RecordLayout,
        num_records: int,
        *,
        folder: Path,
        resident: int,
        name_of: Callable[[int], str] = str,
    ) -> None:
        """Take the room.

        Args:
            layout: Of a record; aligned to pages.
            num_records: How many there are.
            folder: On whose disk the file lies.
            resident: How many records there is memory for.
            name_of: What a record is called in messages.

        Raises:
            DiskFull: If there is not enough room.
        """
        assert layout.alignment % PAGE_BYTES == 0
        assert resident > 1
        self._layout, self._num_records, self._name_of, self._folder = layout, num_records, name_of, folder
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
        # Anonymous pages, so that each buffer begins with one.
        self._slots = [self._new_slot() for _ in range(min(resident, max(2, num_records)))]
        self._sums: dict[tuple[int, str], int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._writes: deque[Future[None]] = deque()
        self.close = weakref.finalize(self, _give_back, self._thread, self._file)

    def _new_slot(self) -> _Slot:
        memory = memoryview(mmap.mmap(-1, self._layout.stride))
        return _Slot(Record(self._layout, torch.frombuffer(memory, dtype=torch.uint8)), memory)

    @property
    def layout(self) -> RecordLayout:
        return self._layout

    @property
    def num_records(self) -> int:
        return self._num_records

    @property
    def host_bytes(self) -> int:
        return len(self._slots) * self._layout.stride

    @property
    def disk_bytes(self) -> int:
        return self._num_records * self._layout.stride

    def walk(self, visits: Iterable[Visit]) -> Iterator[tuple[int, Record]]:
        ahead: deque[tuple[Visit, _Slot, Future[None]]] = deque()
        left = iter(visits)

        def read_next(slot: _Slot) -> None:
            visit = next(left, None)
            if visit is not None:
                ahead.append((visit, slot, self._thread.submit(self._read, visit, slot)))

        try:
            for slot in self._slots:
                read_next(slot)
            while ahead:
                visit, slot, reading = ahead.popleft()
                reading.result()
                slot.record.changed.clear()
                yield visit.index, slot.record
                if slot.record.changed:
                    changed = tuple(slot.record.changed)
                    self._writes.append(self._thread.submit(self._write, visit.index, slot, changed))
                self._raise_failures()
                read_next(slot)
        finally:
            for _, _, reading in ahead:  # whoever walked has stopped early
                reading.cancel()

    def settle(self) -> None:
        while self._writes:
            self._writes.popleft().result()

    def _raise_failures(self) -> None:
        while self._writes and self._writes[0].done():
            self._writes.popleft().result()

    def _read(self, visit: Visit, slot: _Slot) -> None:
        place = visit.index * self._layout.stride
        for offset, size in self._layout.runs(visit.sections):
            view, done = slot.bytes[offset : offset + size], 0
            while done < size:
                count = os.preadv(self._file, [view[done:]], place + offset + done)
                if count == 0:
                    raise self._damaged(visit.index, "the file of experts ends before it")
                done += count
        for section in visit.sections:
            written = self._sums.get((visit.index, section))
            if written is not None and written != self._sum(slot, section):
                raise self._damaged(visit.index, f"its {section.replace('_', ' ')} are not what was written")

    def _write(self, index: int, slot: _Slot, sections: tuple[str, ...]) -> None:
        for section in sections:
            self._sums[index, section] = self._sum(slot, section)
        place = index * self._layout.stride
        with room_needed(self._folder):
            for offset, size in self._layout.runs(sections):
                view, done = slot.bytes[offset : offset + size], 0
                while done < size:
                    done += os.pwrite(self._file, view[done:], place + offset + done)

    def _sum(self, slot: _Slot, section: str) -> int:
        begin = self._layout.offset(section)
        whole = slot.bytes[begin : begin + self._layout.section_bytes]
        samples = np.frombuffer(whole, dtype=np.uint8).reshape(-1, PAGE_BYTES)[:, :_SAMPLE_BYTES]
        return zlib.crc32(samples.tobytes())

    def _damaged(self, index: int, what: str) -> Damaged:
        name = self._name_of(index)
        return Damaged(
            f"{name[0].upper()}{name[1:]} cannot be read back from the disk of {self._folder}: {what}. Check the disk, and "
            "go on with --resume latest, which makes the file anew."
        )


def _give_back(thread: ThreadPoolExecutor, file: int) -> None:
    thread.shutdown(wait=True, cancel_futures=True)
    os.close(file)
