"""write_file: what arrives on the disk is what was handed over, whatever the disk and the memory are like."""

import errno
import fcntl
import hashlib
import mmap
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.checkpoint_writer import disk
from nightschool.checkpoint_writer.disk import PAGE_BYTES, write_file
from nightschool.errors import DiskFull

CHUNK_BYTES = 4 * PAGE_BYTES


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(disk, "_CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(disk, "_SYNC_BYTES", 2 * CHUNK_BYTES)


@pytest.fixture(scope="module")
def memory():
    """Memory that begins at a page, with something else in every byte."""
    with mmap.mmap(-1, 16 * CHUNK_BYTES) as whole:
        whole.write(hashlib.shake_256(b"seed").digest(16 * CHUNK_BYTES))
        yield whole


def _is_direct(handle):
    return bool(disk._DIRECT) and bool(fcntl.fcntl(handle, fcntl.F_GETFL) & disk._DIRECT)


def _check(path, pieces):
    content = b"".join(pieces)
    facts = write_file(path, pieces)
    assert path.read_bytes() == content
    assert (facts.sha256, facts.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))


NEAR_A_PAGE = st.builds(lambda pages, off: max(0, pages * PAGE_BYTES + off), st.integers(0, 20), st.integers(-3, 3))


@given(pieces=st.lists(st.tuples(NEAR_A_PAGE, NEAR_A_PAGE), max_size=4))
@settings(max_examples=60, deadline=None)
def test_pieces_of_any_size_and_place_arrive_whole(tmp_path_factory, memory, pieces):
    path = tmp_path_factory.mktemp("disk") / "file"
    with memoryview(memory) as view:
        _check(path, [bytes(view[start : start + size]) for start, size in pieces])
        path.unlink()
        slices = [view[start : start + size] for start, size in pieces]
        _check(path, slices)
        for piece in slices:
            piece.release()


def _takes_direct_writes(path, memory):
    """Whether the file system does, found out without the code that is tested."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except OSError:
        return False
    try:
        with memoryview(memory) as view, view[:PAGE_BYTES] as page:
            return os.write(handle, page) == PAGE_BYTES
    except OSError:
        return False
    finally:
        os.close(handle)


def test_whole_pages_go_past_the_cache_and_the_rest_does_not(tmp_path, memory, monkeypatch):
    if not _takes_direct_writes(tmp_path / "probe", memory):
        pytest.skip("the file system of the tests takes nothing past its cache")
    written = []
    write = os.write

    def noting(handle, chunk):
        count = write(handle, chunk)
        written.append((_is_direct(handle), count))
        return count

    monkeypatch.setattr(os, "write", noting)
    with memoryview(memory) as view, view[: 2 * CHUNK_BYTES + 5] as piece:
        _check(tmp_path / "file", [piece])
    assert written == [(True, CHUNK_BYTES), (True, CHUNK_BYTES), (False, 5)]


def test_a_disk_that_takes_nothing_past_its_cache_gets_it_through_the_cache(tmp_path, memory, monkeypatch):
    write = os.write
    refused = []

    def refusing(handle, chunk):
        if _is_direct(handle):
            refused.append(len(chunk))
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(handle, chunk)

    # Some file systems refuse the very flag, before any write.
    expected = int(_takes_direct_writes(tmp_path / "probe", memory))
    monkeypatch.setattr(os, "write", refusing)
    with memoryview(memory) as view, view[: 5 * CHUNK_BYTES + 77] as piece:
        _check(tmp_path / "file", [piece])
    assert len(refused) == expected


def test_a_write_that_is_cut_short_is_gone_on_with(tmp_path, memory, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, chunk: write(handle, chunk[: min(len(chunk), PAGE_BYTES + 512)]))
    with memoryview(memory) as view, view[: 3 * CHUNK_BYTES + 77] as piece:
        _check(tmp_path / "file", [piece])


def test_a_full_disk_is_named(tmp_path, memory, monkeypatch):
    def full(handle, chunk):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with memoryview(memory) as view, view[:CHUNK_BYTES] as piece, pytest.raises(DiskFull):
        write_file(tmp_path / "file", [piece])
