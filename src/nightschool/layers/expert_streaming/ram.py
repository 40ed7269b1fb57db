"""Experts in the memory of the host. On a CPU they are computed with where they lie, and nothing is copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from nightschool.layers.expert_streaming.record import Record, RecordLayout
from nightschool.layers.expert_streaming.store import ExpertStore, Visit


class RamStore(ExpertStore):
    """Records in one block of memory; page-locked where a GPU is fed from it."""

    def __init__(self, layout: RecordLayout, num_records: int, *, page_locked: bool = False) -> None:
        super().__init__(layout, num_records)
        block = torch.zeros(num_records * layout.stride, dtype=torch.uint8, pin_memory=page_locked)
        self._records = [
            Record(layout.views(block[place : place + layout.stride], layout.sections), layout.cut)
            for place in range(0, num_records * layout.stride, layout.stride)
        ]

    @property
    def host_bytes(self) -> int:
        return self.num_records * self.layout.stride

    @property
    def disk_bytes(self) -> int:
        return 0

    @property
    def taken_disk_bytes(self) -> int:
        return 0

    def walk(self, visits: Iterable[Visit]) -> Iterator[tuple[int, Record]]:
        for visit in visits:
            self._num_hits += 1
            yield visit.index, self._records[visit.index]
