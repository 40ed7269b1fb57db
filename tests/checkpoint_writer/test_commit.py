"""Writing checkpoints: the bytes of a file, the order of the writes, the parts of several ranks, shared memory."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from nightschool.checkpoint_writer import commit, parts
from nightschool.checkpoint_writer.commit import Order, carry_out, write_folder
from nightschool.checkpoint_writer.shared_buffer import SharedMemory
from nightschool.checkpoint_writer.tensorfile import (
    ALIGNMENT_BYTES,
    ITEM_BYTES,
    TensorInfo,
    index_of,
    part_name,
    plan_files,
)
from nightschool.errors import Conflict, Damaged, DiskFull, NotFound
from nightschool.events import read_events
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.manifest import verify
from nightschool.store.runs import RunStore
from tests.support.crash_points import fill_disk_everywhere, kill_everywhere
from tests.support.live_server import eventually

NUMPY = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


@pytest.fixture
def run(tmp_path):
    return RunStore(Home(tmp_path)).create({"a": 1}, name="bot")


def contents_of(**texts):
    def contents():
        for name, text in texts.items():
            yield name.replace("_", "."), [text.encode()]

    return contents


def order(run, step, **more):
    target = checkpoints.checkpoint_path(run, 0, step, 1)
    return Order(str(target), {"step": step, "heldout_loss": None} | more.pop("facts", {}), **more)


def save(run, step, **more):
    return carry_out(run, order(run, step, **more), contents_of(a_txt=f"state {step}", b_txt="x" * 1000))


def steps(run):
    return [point.step for point in checkpoints.ls(run)]


# --- the bytes ----------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8), st.tuples(st.sampled_from(sorted(NUMPY)), shapes), max_size=12
    ),
    limit=st.integers(1, 400),
)
def test_files_are_what_safetensors_reads(tmp_path_factory, tensors, limit):
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    facts = [TensorInfo(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    arrays = {f.name: (random.random(f.shape) * 100).astype(NUMPY[f.dtype]) for f in facts}
    files = plan_files("model", facts, limit_bytes=limit)
    found = {}
    for file in files:
        content = file.header + b"".join(arrays[tensor.name].tobytes() for tensor in file.tensors)
        assert len(content) == file.size_bytes
        assert len(file.header) % ALIGNMENT_BYTES == 0
        assert file.size_bytes - len(file.header) <= limit or len(file.tensors) == 1
        (folder / file.name).write_bytes(content)
        loaded = load_file(folder / file.name)
        assert not loaded.keys() & found.keys()
        found |= loaded
        offset = 0
        for tensor in file.tensors:  # each lies where its own type can be read in place
            assert offset % ITEM_BYTES[tensor.dtype] == 0
            offset += tensor.size_bytes
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    index = json.loads(index_of(files))
    assert index["weight_map"].keys() == arrays.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())


def test_one_file_has_a_plain_name_and_several_are_numbered():
    assert part_name("model", 0, 1) == "model.safetensors"
    assert part_name("optimizer", 1, 3) == "optimizer-00002-of-00003.safetensors"
    facts = [TensorInfo(name, "F32", (100,)) for name in "abc"]
    assert [file.name for file in plan_files("model", facts, limit_bytes=800)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_digests_are_those_of_the_bytes_that_were_written(run):
    outcome = save(run, 1)
    point = checkpoints.ls(run)[0]
    manifest = verify(point.path, digests=True)
    assert (outcome.error, outcome.size_bytes) == (None, manifest.size_bytes)
    (point.path / "a.txt").write_text("state 2")
    with pytest.raises(Damaged, match="SHA-256"):
        verify(point.path, digests=True)


# --- the order of the writes --------------------------------------------------------------------------------------


def test_a_save_is_announced_and_old_ones_go(run):
    for step in (1, 2, 3):
        outcome = save(run, step, keep={"last": 2, "best": 0})
    assert steps(run) == [2, 3]
    assert outcome.removed == [checkpoints.checkpoint_name(0, 1, 1)]
    assert (run.checkpoints_path / "latest").read_text().strip() == outcome.name
    rows = list(read_events(run.events_path))
    assert [(row["event"], row["step"]) for row in rows] == [("checkpoint", 1), ("checkpoint", 2), ("checkpoint", 3)]
    assert rows[-1]["removed"] == outcome.removed


def test_a_kill_at_any_moment_leaves_the_newest_or_the_one_before(run):
    """Rename, pointer and retention included."""
    save(run, 1)
    kills = 0
    for _ in kill_everywhere(lambda: save(run, 2, keep={"last": 1, "best": 0})):
        kills += 1
        newest = checkpoints.newest_whole(run)
        assert newest.skipped == ()
        assert newest.checkpoint.step in (1, 2)
        if newest.checkpoint.step == 2:  # committed before the kill; the next attempt saves it again
            assert (newest.checkpoint.path / "a.txt").read_text() == "state 2"
    assert kills > 10
    assert steps(run) == [2]
    assert not list(run.checkpoints_path.glob("*.partial"))


def test_a_kill_while_a_checkpoint_is_replaced_leaves_an_older_one(run):
    save(run, 1)
    save(run, 2)
    for _ in kill_everywhere(lambda: save(run, 2)):
        newest = checkpoints.newest_whole(run)
        assert newest.skipped == ()
        assert newest.checkpoint.step in (1, 2)
    assert steps(run) == [1, 2]


@pytest.mark.parametrize("stays_full", [False, True])
def test_a_full_disk_at_any_moment_keeps_what_was_there(run, stays_full):
    save(run, 1)

    def work():
        outcome = save(run, 2, keep={"last": 1, "best": 0})
        if outcome.disk_full:
            raise DiskFull(outcome.error)

    if stays_full:
        for _ in fill_disk_everywhere(work, stays_full=True):
            newest = checkpoints.newest_whole(run)
            assert newest.skipped == ()
            assert newest.checkpoint is not None
    else:
        # Full once: retention makes room, and the second try succeeds.
        seen = []
        for _ in fill_disk_everywhere(work, stays_full=False):
            seen.append(1)
        assert len(seen) <= 2  # only where nothing of the checkpoint is at stake any more
    assert checkpoints.newest_whole(run).checkpoint.step == 2


def test_a_full_disk_makes_room_by_retention_and_tries_once_more(run, monkeypatch):
    for step in (1, 2, 3):
        save(run, step, keep={"last": 9})
    write = commit.write_file

    def full(path, pieces):
        if len(checkpoints.ls(run)) > 1:
            raise DiskFull("There is no room.")
        return write(path, pieces)

    monkeypatch.setattr(commit, "write_file", full)
    assert save(run, 4, keep={"last": 1, "best": 0}).error is None
    assert steps(run) == [4]
    assert [row["event"] for row in read_events(run.events_path)][-2:] == ["disk_full", "checkpoint"]
    monkeypatch.setattr(commit, "write_file", lambda *_: (_ for _ in ()).throw(DiskFull("There is no room.")))
    outcome = save(run, 5, keep={"last": 1, "best": 0})
    assert outcome.disk_full
    assert str(outcome) == f"Not saved {outcome.name}: There is no room."
    assert steps(run) == [4]
    assert not list(run.checkpoints_path.glob("*.partial"))


# --- several ranks ------------------------------------------------------------------------------------------------


def rank_order(run, rank, step=1, num_ranks=3, attempt=1):
    return order(run, step, rank=rank, num_ranks=num_ranks, facts={"attempt": attempt})


def in_threads(work):
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_the_files_of_all_ranks_are_one_checkpoint(run):
    outcomes = {}

    def save_rank(rank):
        contents = contents_of(**{f"state{rank}_txt": f"of rank {rank}"})
        outcomes[rank] = carry_out(run, rank_order(run, rank), contents)

    in_threads([lambda rank=rank: save_rank(rank) for rank in range(3)])
    assert [outcomes[rank].error for rank in range(3)] == [None] * 3
    point = checkpoints.ls(run)[0]
    assert set(verify(point.path, digests=True).files) == {f"state{rank}.txt" for rank in range(3)}
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == [point.name, "latest"]
    assert [row["event"] for row in read_events(run.events_path)] == ["checkpoint"]


def test_a_rank_that_does_not_deliver_is_named_and_the_others_hear_of_it(run, monkeypatch):
    monkeypatch.setattr(parts, "WAIT_SECONDS", 0.3)
    outcomes = {}
    target = checkpoints.checkpoint_path(run, 0, 1, 1)
    stale = target.with_name(target.name + ".rank2.partial")
    stale.mkdir()
    (stale / "part.json").write_text(json.dumps({"files": {}, "step": 1, "attempt": 0}))  # of a process that died

    def save_rank(rank):
        outcomes[rank] = carry_out(run, rank_order(run, rank), contents_of(**{f"s{rank}_txt": "x"}))

    in_threads([lambda rank=rank: save_rank(rank) for rank in range(2)])
    assert "Rank 2 did not deliver" in outcomes[0].error
    assert "Rank 0 could not commit the checkpoint: Rank 2 did not deliver" in outcomes[1].error
    assert checkpoints.ls(run) == []


@pytest.mark.parametrize(("error", "disk_full"), [(DiskFull("There is no room."), True), (OSError("broken"), False)])
def test_a_rank_that_cannot_write_says_so_at_once(run, monkeypatch, error, disk_full):
    write = commit.write_file
    outcomes = {}

    def failing(path, pieces):
        if ".rank1." in str(path):
            raise error
        return write(path, pieces)

    monkeypatch.setattr(commit, "write_file", failing)

    def save_rank(rank):
        outcomes[rank] = carry_out(run, rank_order(run, rank, step=5), contents_of(**{f"s{rank}_txt": "x"}))

    save(run, 1)
    save(run, 2)
    in_threads([lambda rank=rank: save_rank(rank) for rank in range(3)])
    assert "Rank 1 could not write its part" in outcomes[0].error
    assert outcomes[1].error == str(error)
    assert "Rank 0 could not commit the checkpoint: Rank 1 could not write" in outcomes[2].error
    assert {outcome.disk_full for outcome in outcomes.values()} == {disk_full}
    assert steps(run) == [1, 2]
    assert not list(run.checkpoints_path.glob("*.partial"))


def test_rank_0_that_cannot_write_is_heard_by_a_rank_that_begins_later(run, monkeypatch):
    write = commit.write_file

    def failing(path, pieces):
        if ".rank" not in str(path):
            raise DiskFull("There is no room.")
        return write(path, pieces)

    monkeypatch.setattr(commit, "write_file", failing)
    first = carry_out(run, rank_order(run, 0), contents_of(a_txt="x"))
    other = carry_out(run, rank_order(run, 1), contents_of(b_txt="x"))
    assert (first.disk_full, other.disk_full) == (True, True)
    assert other.error == "Rank 0 could not commit the checkpoint: There is no room."
    # A writer in place of one that was killed right afterwards does not wait for ranks that were sent away.
    monkeypatch.setattr(commit, "write_file", write)
    again = carry_out(run, rank_order(run, 0), contents_of(a_txt="x"))
    assert (again.error, again.disk_full) == (other.error, True)
    # The next save of all has nothing to do with it.
    outcomes = save_ranks(run, step=2)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == [checkpoints.ls(run)[0].name, "latest"]


def save_ranks(run, step):
    outcomes = [None] * 3

    def save_rank(rank):
        outcomes[rank] = carry_out(run, rank_order(run, rank, step=step), contents_of(**{f"s{rank}_txt": "x" * 9}))

    in_threads([lambda rank=rank: save_rank(rank) for rank in range(3)])
    return outcomes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_writer_that_was_killed_after_the_commit_is_done_again_without_harm(run, rank):
    assert [outcome.error for outcome in save_ranks(run, step=1)] == [None] * 3
    before = verify(checkpoints.ls(run)[0].path, digests=True)
    again = carry_out(run, rank_order(run, rank), contents_of(**{f"s{rank}_txt": "x" * 9}))
    assert again.error is None
    assert verify(checkpoints.ls(run)[0].path, digests=True) == before


def test_a_second_try_of_rank_0_finds_the_parts_again(run, monkeypatch):
    seal, tries = commit.seal, []

    def full_once(*arguments):
        tries.append(1)
        if len(tries) == 1:
            raise DiskFull("There is no room.")
        return seal(*arguments)

    monkeypatch.setattr(commit, "seal", full_once)
    assert [outcome.error for outcome in save_ranks(run, step=1)] == [None] * 3
    assert len(tries) == 2
    assert set(verify(checkpoints.ls(run)[0].path, digests=True).files) == {f"s{rank}.txt" for rank in range(3)}


def test_a_rank_0_that_is_gone_is_not_waited_for(run, monkeypatch):
    monkeypatch.setattr(parts, "GONE_SECONDS", 0.3)
    monkeypatch.setattr(parts, "_LOOK_SECONDS", 0.05)
    with lock(run.writing_lock_path(0), "the checkpoints"):
        thread, outcomes = begin_rank_1(run)
        thread.join(1)
        assert thread.is_alive()  # it may be slow, but it is there
    thread.join(10)
    assert "Rank 0 did not commit" in outcomes[0].error


def begin_rank_1(run):
    outcomes = []
    thread = threading.Thread(
        target=lambda: outcomes.append(carry_out(run, rank_order(run, 1), contents_of(a_txt="x")))
    )
    thread.start()
    target = checkpoints.checkpoint_path(run, 0, 1, 1)
    eventually((target.with_name(target.name + ".rank1.partial") / parts.RECEIPT).is_file)
    return thread, outcomes


def test_a_new_attempt_lets_go_of_what_an_old_one_waits_for(run):
    thread, outcomes = begin_rank_1(run)
    parts.release_stale_parts(run.checkpoints_path)
    thread.join(10)
    assert "is not waited for any more" in outcomes[0].error
    assert not list(run.checkpoints_path.glob("*.partial"))


def test_two_ranks_may_not_write_the_same_name(run, tmp_path):
    target = tmp_path / "point"
    shared = parts.SharedSave(target, num_ranks=2, step=1, attempt=1, lock_path=run.writing_lock_path)
    with shared.own_part(1) as folder:
        (folder / "a.txt").write_text("x")
        shared.deliver(folder, {"a.txt": parts.FileInfo("0", 1)})
        with pytest.raises(Conflict, match=r"Rank 1 wrote a\.txt"):
            write_folder(target, {"step": 1}, contents_of(a_txt="y"), shared=shared)
    assert not target.exists()


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anonymous", [True, False])
def test_memory_is_seen_by_who_inherits_its_descriptor(monkeypatch, anonymous):
    if not anonymous:  # a kernel that gives none
        monkeypatch.delattr(os, "memfd_create")
    memory = SharedMemory.create()
    memory.reserve(100)
    memory.view[0:5] = b"hello"
    memory.reserve(5_000_000)
    memory.view[4_999_999:5_000_000] = b"!"
    code = (
        "import sys; from nightschool.checkpoint_writer.shared_buffer import SharedMemory\n"
        "m = SharedMemory(int(sys.argv[1])); m.attach(5_000_000)\n"
        "sys.stdout.buffer.write(m.view[0:5] + m.view[4_999_999:5_000_000])"
    )
    command = [sys.executable, "-c", code, str(memory.handle)]
    assert subprocess.run(command, pass_fds=[memory.handle], stdout=subprocess.PIPE, check=True).stdout == b"hello!"
    memory.close()


def test_the_writer_never_loads_torch():
    code = "import sys, nightschool.checkpoint_writer.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_that_was_never_saved_is_found(run):
    with pytest.raises(NotFound):
        checkpoints.get(run, "checkpoint-epoch0-step1-files1")
