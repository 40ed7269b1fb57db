"""What a store of experts is given it gives back, wherever it keeps it, and what is lost on the way is named."""

import os
import resource
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.errors import Damaged, DiskFull
from nightschool.layers.expert_streaming import file
from nightschool.layers.expert_streaming.file import PAGE_BYTES, FileStore
from nightschool.layers.expert_streaming.ram import RamStore
from nightschool.layers.expert_streaming.record import LEARNING, SECOND_MOMENT, WEIGHTS, RecordLayout
from nightschool.layers.expert_streaming.store import Visit

NUM_RECORDS, NUMBERS = 5, 1500


def halves(section):
    return section[: NUMBERS // 2], section[NUMBERS // 2 :]


def file_store(folder, resident=2, numbers=NUMBERS):
    layout = RecordLayout(LEARNING, numbers, torch.float32, PAGE_BYTES, halves)
    return FileStore(layout, NUM_RECORDS, folder=folder, resident=resident, name_of=lambda index: f"expert {index}")


def visited(store, steps):
    """Walk as `steps` say, changing what they name; return the sum of all that was seen."""
    seen = []
    for number, (index, sections, changed) in enumerate(steps, start=1):
        for _, record in store.walk([Visit(index, sections, changed)]):
            seen += [float(record[section].double().sum()) for section in sections]
            for section in changed:
                record[section].fill_(number)
                record.matrices(section)[1].add_(len(seen))
    return seen


sections = st.lists(st.sampled_from(LEARNING), min_size=1, unique=True).map(tuple)
steps = st.lists(st.tuples(st.integers(0, NUM_RECORDS - 1), sections, sections), max_size=12)


@settings(max_examples=25, deadline=None)
@given(steps=steps, resident=st.integers(2, 6))
def test_a_file_keeps_what_memory_keeps(tmp_path_factory, steps, resident):
    ram = RamStore(RecordLayout(LEARNING, NUMBERS, torch.float32, 64, halves), NUM_RECORDS)
    disk = file_store(tmp_path_factory.getbasetemp(), resident)
    assert visited(disk, steps) == visited(ram, steps)
    assert disk.host_bytes <= resident * disk.layout.stride


def test_records_come_in_the_order_of_the_walk_each_as_it_was_written_last(tmp_path):
    store = file_store(tmp_path, resident=3)
    order = (4, 0, 2, 3, 1)
    for turn in range(3):
        for place, (index, record) in enumerate(store.walk(Visit(i, (WEIGHTS,), (WEIGHTS,)) for i in order)):
            assert index == order[place]
            assert set(record[WEIGHTS].tolist()) == {float(turn)}
            record[WEIGHTS].fill_(turn + 1)


@pytest.mark.parametrize("populates", [True, False], ids=["of today", "of an older kernel"])
def test_an_expert_that_is_not_there_any_more_is_named(tmp_path, populates):
    store = file_store(tmp_path)
    store._populates = populates
    os.ftruncate(store._file, 3 * store.layout.stride + 100)
    for changed in ((), (SECOND_MOMENT,)):
        with pytest.raises(Damaged, match="Expert 3 cannot be read from the disk"):
            visited(store, [(3, (SECOND_MOMENT,), changed)])


def test_a_disk_that_fills_up_is_told(tmp_path, monkeypatch):
    store = file_store(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file.os, "pwrite", full)
    with pytest.raises(DiskFull):
        visited(store, [(3, (WEIGHTS,), (WEIGHTS,))])


def test_no_more_experts_are_in_memory_than_may_be(tmp_path):
    store = file_store(tmp_path, resident=3, numbers=200_000)
    for index, _ in store.walk(Visit(i, LEARNING) for i in range(NUM_RECORDS)):
        mapped = [line for line in Path("/proc/self/smaps").read_text().split("\n") if line]
        start = next(n for n, line in enumerate(mapped) if str(tmp_path) in line or f"{tmp_path.name}/#" in line)
        rss = next(int(line.split()[1]) for line in mapped[start:] if line.startswith("Rss:")) * 1024
        assert rss <= min(index + 1, 2) * store.layout.stride + 256 * 1024


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(file.shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(DiskFull, match=r"The experts take 164 kB .* and 1 kB are free"):
        file_store(tmp_path)


def test_a_file_that_may_not_become_so_long_is_refused(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DiskFull, match=r"longer than files may become here.* Raise the limit"):
            file_store(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_on_the_disk(tmp_path):
    store = file_store(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert store.disk_bytes == NUM_RECORDS * store.layout.stride
