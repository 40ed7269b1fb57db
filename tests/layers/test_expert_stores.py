"""What a store of experts is given it gives back, wherever it keeps it, and what is lost on the way is named."""

import os
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.errors import Damaged, DiskFull
from nightschool.layers.expert_streaming import file
from nightschool.layers.expert_streaming.file import PAGE_BYTES, FileStore
from nightschool.layers.expert_streaming.ram import RamStore
from nightschool.layers.expert_streaming.record import LEARNING, WEIGHTS, RecordLayout
from nightschool.layers.expert_streaming.store import Visit

NUM_RECORDS, NUMBERS = 5, 1500


def file_store(folder, resident=2):
    layout = RecordLayout(LEARNING, NUMBERS, torch.float32, PAGE_BYTES)
    return FileStore(layout, NUM_RECORDS, folder=folder, resident=resident, name_of=lambda index: f"expert {index}")


def visited(store, steps):
    """Walk as `steps` say, changing what they name; return the sum of all that was seen."""
    seen = []
    for number, (index, sections, changed) in enumerate(steps, start=1):
        for _, record in store.walk([Visit(index, sections)]):
            seen += [float(record[section].double().sum()) for section in sections]
            for section in changed:
                record[section].fill_(number)
                record.changed.add(section)
    store.settle()
    return seen


sections = st.lists(st.sampled_from(LEARNING), min_size=1, unique=True).map(tuple)
steps = st.lists(st.tuples(st.integers(0, NUM_RECORDS - 1), sections, sections), max_size=12)


@settings(max_examples=25, deadline=None)
@given(steps=steps, resident=st.integers(2, 6))
def test_a_file_keeps_what_memory_keeps(tmp_path_factory, steps, resident):
    ram = RamStore(RecordLayout(LEARNING, NUMBERS, torch.float32, 64), NUM_RECORDS)
    disk = file_store(tmp_path_factory.getbasetemp(), resident)
    assert visited(disk, steps) == visited(ram, steps)
    assert disk.host_bytes <= resident * disk.layout.stride
    disk.close()


def test_records_come_in_the_order_of_the_walk_each_as_it_was_written_last(tmp_path):
    store = file_store(tmp_path, resident=3)
    order = (4, 0, 2, 3, 1)
    for turn in range(3):
        for place, (index, record) in enumerate(store.walk(Visit(i, (WEIGHTS,)) for i in order)):
            assert index == order[place]
            assert set(record[WEIGHTS].tolist()) == {float(turn)}
            record[WEIGHTS].fill_(turn + 1)
            record.changed.add(WEIGHTS)
    store.close()


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_what_is_not_what_was_written_is_named(tmp_path, damage):
    store = file_store(tmp_path)
    visited(store, [(3, (WEIGHTS,), (WEIGHTS,))])
    descriptor = store._file
    if damage == "truncated":
        os.ftruncate(descriptor, 3 * store.layout.stride + 100)
    else:
        os.pwrite(descriptor, b"x" * PAGE_BYTES, 3 * store.layout.stride + PAGE_BYTES)
    with pytest.raises(Damaged, match="Expert 3 cannot be read back"):
        visited(store, [(3, (WEIGHTS,), ())])
    store.close()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(file.shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(DiskFull, match=r"The experts take 164 kB .* and 1 kB are free"):
        file_store(tmp_path)


def test_a_disk_that_fills_up_is_told(tmp_path, monkeypatch):
    store = file_store(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file.os, "pwrite", full)
    with pytest.raises(DiskFull):
        visited(store, [(3, (WEIGHTS,), (WEIGHTS,))])
    store.close()


def test_nothing_is_left_on_the_disk(tmp_path):
    store = file_store(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert store.disk_bytes == NUM_RECORDS * store.layout.stride
    store.close()
