"""Experts are read from the files of a folder as they lie there, and what happens to such a file is told."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.errors import Damaged
from nightschool.layers.expert_streaming.kept import LastUsed, MostUsed
from nightschool.layers.expert_streaming.record import WEIGHTS, RecordLayout
from nightschool.layers.expert_streaming.stock import Piece, StockFile, StockStore
from nightschool.layers.expert_streaming.store import Visit

SIZES = (12, 20, 7)
NUM_RECORDS, NUMBERS = 5, sum(SIZES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def written(folder, order, gap, dtype):
    """All pieces of all records in two files, in some order, with a gap before each: the numbers and the pieces of records."""
    numbers = torch.randn(NUM_RECORDS, NUMBERS, generator=torch.Generator().manual_seed(0)).to(dtype)
    paths = [folder / f"{each}.safetensors" for each in range(2)]
    content, places = [bytearray(), bytearray()], {}
    for place in order:
        record, which = divmod(place, len(SIZES))
        begin = sum(SIZES[:which])
        to = content[place % 2]
        to += bytes(gap * 2)
        places[place] = place % 2, len(to)
        to += numbers[record, begin : begin + SIZES[which]].view(torch.uint8).numpy().tobytes()
    for path, raw in zip(paths, content, strict=True):
        path.write_bytes(raw)
    files = [StockFile(path) for path in paths]
    return numbers, [
        [Piece(files[places[r * 3 + w][0]], places[r * 3 + w][1], SIZES[w], dtype) for w in range(3)]
        for r in range(NUM_RECORDS)
    ]


def store_of(records, dtype=torch.float32, resident=2, **more):
    layout = RecordLayout((WEIGHTS,), NUMBERS, dtype, 64, lambda section: (section[:32], section[32:]))
    return StockStore(layout, records, resident=resident, name_of=lambda index: f"expert {index}", **more)


def seen(store, index):
    ((_, record),) = store.walk([Visit(index, (WEIGHTS,))])
    return record[WEIGHTS]


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(NUM_RECORDS * len(SIZES))),
    gap=st.integers(0, 40),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    resident=st.integers(1, 6),
    visits=st.lists(st.integers(0, NUM_RECORDS - 1), max_size=20),
    most_used=st.booleans(),
)
def test_numbers_are_those_of_the_files_wherever_they_lie(
    tmp_path_factory, order, gap, dtypes, resident, visits, most_used
):
    in_files, wanted = dtypes
    numbers, records = written(tmp_path_factory.getbasetemp(), order, gap, in_files)
    store = store_of(records, wanted, resident, kept=MostUsed(resident) if most_used else LastUsed())
    for place, (index, record) in enumerate(store.walk(Visit(index, (WEIGHTS,)) for index in visits)):
        assert index == visits[place]
        assert torch.equal(record[WEIGHTS], numbers[index].to(wanted))
        assert record[WEIGHTS].data_ptr() % 64 == 0, "products would have other last bits"
    hits, misses = store.turns
    assert hits + misses == len(visits)
    assert misses >= len(set(visits))
    assert resident < NUM_RECORDS or misses == len(set(visits))
    assert store.host_bytes == min(resident, NUM_RECORDS) * store.layout.stride
    assert (store.disk_bytes, store.taken_disk_bytes) == (numbers.nbytes, 0)


@pytest.mark.parametrize("what", ["cut off", "changed"])
def test_a_file_that_does_not_stay_is_told_and_what_was_read_stays(tmp_path, what):
    numbers, records = written(tmp_path, range(15), 0, torch.float32)
    store = store_of(records)
    seen(store, 1)
    path = records[4][0].file.path
    before = path.stat()
    if what == "cut off":
        os.truncate(path, before.st_size // 2)
    else:
        with path.open("r+b") as file:
            file.write(b"another one")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert torch.equal(seen(store, 1), numbers[1])
    for _ in range(2):
        with pytest.raises(Damaged, match=rf"{path} was {what} while experts were read from it\. Restore the folder"):
            seen(store, 4)
    assert torch.equal(seen(store, 1), numbers[1])


def test_a_name_that_comes_to_another_file_changes_nothing(tmp_path):
    numbers, records = written(tmp_path, range(15), 0, torch.float32)
    store = store_of(records)
    for path in {piece.file.path for record in records for piece in record}:
        (tmp_path / "new").write_bytes(b"")
        (tmp_path / "new").replace(path)
    assert torch.equal(seen(store, 4), numbers[4])


def test_an_expert_that_is_not_finite_is_named_when_it_is_needed(tmp_path):
    _, records = written(tmp_path, range(15), 0, torch.float32)
    piece = records[3][1]
    with piece.file.path.open("r+b") as file:
        file.seek(piece.begin)
        file.write(torch.tensor([float("inf")]).numpy().tobytes())
    store = store_of([[Piece(StockFile(p.file.path), p.begin, p.numbers, p.dtype) for p in r] for r in records])
    seen(store, 2)
    for _ in range(2):
        with pytest.raises(Damaged, match="The weights of expert 3 of the base hold NaN or infinity"):
            seen(store, 3)
