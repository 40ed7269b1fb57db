"""What survives: SIGKILL of a writer, two writers at once, a full disk."""

import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time

import pytest

from nightschool.errors import DiskFull, Locked
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.memory.store.connection import translated

FORK = multiprocessing.get_context("fork")


def write_and_say(folder, pipe, seed):
    """Write revisions of three entries that belong together, and say each when it was acknowledged."""
    with MemoryStore.open(folder) as store:
        number = store.revision
        while True:
            number += 1
            store.add([NewEntry(subject=f"Person {n}", relation="number", value=f"{number}") for n in range(3)],
                      author=str(seed))  # fmt: skip
            os.write(pipe, b"%d\n" % number)


def test_a_killed_writer_loses_nothing_acknowledged_and_leaves_nothing_half_done(tmp_path):
    folder = tmp_path / "facts"
    MemoryStore.create(folder).close()
    chance = random.Random(3)
    for round_ in range(12):
        end, pipe = os.pipe()
        writer = FORK.Process(target=write_and_say, args=(folder, pipe, round_))
        writer.start()
        os.close(pipe)
        first = os.read(end, 16)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        said = first
        while more := os.read(end, 65536):
            said += more
        os.close(end)
        acknowledged = int(said.split(b"\n")[:-1][-1])
        with MemoryStore.open(folder) as store:
            assert store.revision in (acknowledged, acknowledged + 1)
            values = {one.value for one in store.entries()}
            assert values == {str(store.revision)}
            assert store.count() == 3
            assert store.check().is_whole


def add_many(folder, who, count):
    with MemoryStore.open(folder) as store:
        for n in range(count):
            store.add([NewEntry(f"{who}{n} lives in Oslo.")], author=who)


def test_two_processes_that_write_wait_for_each_other(tmp_path):
    folder = tmp_path / "facts"
    with MemoryStore.create(folder) as store:
        writers = [FORK.Process(target=add_many, args=(folder, who, 40)) for who in ("Ada", "Bob")]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0, 0]
        assert (store.count(), store.revision) == (80, 80)
        assert store.check().is_whole


def test_a_writer_that_waits_too_long_says_so_and_changes_nothing(tmp_path):
    with MemoryStore.create(tmp_path / "facts", busy_seconds=0.05) as store:
        other = sqlite3.connect(store.folder / "memory.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Locked, match="nothing was changed"):
            store.add([NewEntry("Ada lives in Oslo.")], author="ada")
        assert store.count() == 0
        other.execute("ROLLBACK")
        other.close()
        store.add([NewEntry("Ada lives in Oslo.")], author="ada")


def test_readers_of_one_revision_see_one_state_while_others_write(tmp_path):
    with MemoryStore.create(tmp_path / "facts") as store:
        store.add([NewEntry(subject=f"P{n}", relation="number", value="0") for n in range(50)], author="ada")
        done = threading.Event()

        def write():
            for number in range(1, 40):
                store.add([NewEntry(subject=f"P{n}", relation="number", value=f"{number}") for n in range(50)],
                          author="ada")  # fmt: skip
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        seen = set()
        while not done.is_set():
            revision = store.revision
            values = {one.value for one in store.entries(at=revision)}
            assert values == {str(revision - 1)}
            seen |= values
        writer.join()
        assert len(seen) > 1


def test_a_full_disk_is_said(tmp_path):
    with MemoryStore.create(tmp_path / "facts") as store:
        with store._connections.alone() as connection:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(DiskFull, match="still whole"):
            store.add((NewEntry(f"Person {n} lives in Town{n}.") for n in range(500)), author="ada")
        assert store.count() == 0
    assert isinstance(translated(sqlite3.OperationalError("database or disk is full"), tmp_path), DiskFull)
