"""Old or new, never a mixture: at every crash point, on a full disk, and beside other writers."""

import errno
import fcntl
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.errors import Conflict, Damaged, DiskFull, Locked, NotFound
from nightschool.store import atomic
from nightschool.store.atomic import (
    publish_directory,
    read_json,
    remove_folder,
    room_needed,
    sweep_partials,
    write_bytes,
    write_json,
    write_text,
)
from nightschool.store.locks import lock
from tests.support.crash_points import fill_disk_everywhere, kill_everywhere


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=30, deadline=None)
@given(contents=st.lists(st.binary(max_size=3000), min_size=1, max_size=4))
def test_the_last_content_stays_and_nothing_else(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("atomic")
    for content in contents:
        write_bytes(folder / "deep" / "file", content)
        assert (folder / "deep" / "file").read_bytes() == content
    assert entries(folder / "deep") == ["file"]


def test_a_file_name_of_255_bytes_can_be_written(tmp_path):
    write_text(tmp_path / ("n" * 255), "x")
    assert entries(tmp_path) == ["n" * 255]


def test_json_goes_and_comes(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a": 1} x'])
def test_json_that_is_none_is_damaged_and_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(NotFound, match=r"b\.json"):
        read_json(tmp_path / "b.json")


def test_a_write_that_is_killed_anywhere_leaves_the_old_or_the_new(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    seen = set()
    for _ in kill_everywhere(lambda: write_bytes(path, b"new" * 1000)):
        seen.add(path.read_bytes())
        sweep_partials(tmp_path)
        assert entries(tmp_path) == ["file"]
    assert seen == {b"old", b"new" * 1000}


@pytest.mark.parametrize("stays_full", [True, False])
def test_a_write_on_a_full_disk_says_so_and_leaves_no_rest(tmp_path, stays_full):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    points = 0
    for _ in fill_disk_everywhere(lambda: write_bytes(path, b"new"), stays_full=stays_full):
        points += 1
        assert path.read_bytes() in (b"old", b"new")
        assert entries(tmp_path) == ["file"]
        write_bytes(path, b"old")
    assert points >= 4


def test_full_disks_are_recognised_whoever_reports_them(tmp_path):
    for error in (
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ):
        with (
            pytest.raises(DiskFull, match=r"no room on the disk for .*file.*Free some space"),
            room_needed(tmp_path / "file"),
        ):
            raise error
    for error in (OSError(errno.EIO, "x"), RuntimeError("no space"), KeyError("a")):
        with pytest.raises(type(error)), room_needed(tmp_path):
            raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "x"), "file cannot be written: its file system is read-only. Make it writable"),
        (RuntimeError("I/O error: Read-only file system (os error 30)"), "its file system is read-only"),
        (PermissionError(errno.EACCES, "x", "/other"), r"/other is closed to this user \(Permission denied\). Change"),
        (PermissionError(errno.EPERM, "x"), "file is closed to this user"),
    ],
)
def test_what_may_not_be_written_is_named_with_its_remedy(tmp_path, error, said):
    with pytest.raises(Conflict, match=said), room_needed(tmp_path / "file"):
        raise error


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with publish_directory(target) as folder:
        assert folder.name == "target.partial"
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert entries(target.parent) == ["target"]
    with pytest.raises(Conflict, match="nothing is ever written over"), publish_directory(target):
        raise AssertionError("not reached")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_fails_leaves_nothing(tmp_path, error):
    def work():
        with publish_directory(tmp_path / "target") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        work()
    assert entries(tmp_path) == []


def test_a_folder_that_is_killed_anywhere_is_whole_or_absent(tmp_path):
    target = tmp_path / "target"

    def work():
        with publish_directory(target) as folder:
            assert entries(folder) == []  # What the killed ones left is gone.
            (folder / "a").write_bytes(b"a")
            (folder / "sub").mkdir()
            (folder / "sub" / "b").write_bytes(b"b")

    for _ in kill_everywhere(work):
        if target.exists():
            assert [(target / "a").read_bytes(), (target / "sub" / "b").read_bytes()] == [b"a", b"b"]
            remove_folder(target)


@pytest.mark.parametrize("stays_full", [True, False])
def test_a_folder_on_a_full_disk_is_whole_or_absent(tmp_path, stays_full):
    target = tmp_path / "target"

    def work():
        with publish_directory(target) as folder:
            (folder / "a").write_bytes(b"a")

    for _ in fill_disk_everywhere(work, stays_full=stays_full):
        if target.exists():
            assert (target / "a").read_bytes() == b"a"
            remove_folder(target)


def test_an_empty_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(Conflict), publish_directory(tmp_path / "target"):
        (tmp_path / "target").mkdir()
    assert entries(tmp_path) == ["target"]


def test_sweeping_takes_the_dead_and_leaves_the_living(tmp_path):
    (tmp_path / "dead.partial").mkdir()
    (tmp_path / "dead.partial" / "file").write_text("x")
    (tmp_path / ".dead-1.partial").write_text("x")
    (tmp_path / "link.partial").symlink_to(tmp_path)
    (tmp_path / "whole").mkdir()
    with publish_directory(tmp_path / "alive") as folder:
        (folder / "file").write_text("x")
        swept = sweep_partials(tmp_path)
        assert sorted(path.name for path in swept) == [".dead-1.partial", "dead.partial", "link.partial"]
    assert entries(tmp_path) == ["alive", "whole"]
    assert sweep_partials(tmp_path / "absent") == []


def test_two_writers_of_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_CLAIM_SECONDS", 0.05)
    with (
        publish_directory(tmp_path / "target"),
        pytest.raises(Locked, match=r"target\.partial"),
        publish_directory(tmp_path / "target"),
    ):
        raise AssertionError("not reached")


def test_writers_beside_a_sweeper_lose_nothing(tmp_path):
    done = threading.Event()

    def sweep():
        while not done.is_set():
            sweep_partials(tmp_path)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for index in range(150):
            write_text(tmp_path / "file", str(index))
            assert (tmp_path / "file").read_text() == str(index)
            with publish_directory(tmp_path / f"folder-{index}") as folder:
                (folder / "x").write_text("x")
    finally:
        done.set()
        sweeper.join()
    assert len(entries(tmp_path)) == 151


def test_removing_a_folder_that_is_killed_anywhere_leaves_all_or_nothing(tmp_path):
    target = tmp_path / "target"

    def fill():
        with publish_directory(target) as folder:
            for name in "abc":
                (folder / name).write_text(name)

    fill()
    for _ in kill_everywhere(lambda: remove_folder(target)):
        if target.exists():
            assert entries(target) == ["a", "b", "c"]
        else:
            sweep_partials(tmp_path)
            assert entries(tmp_path) == []
            fill()


def test_a_lock_names_its_holder_and_can_be_waited_for(tmp_path):
    path = tmp_path / "locks" / "a.lock"
    with (
        lock(path, "the thing"),
        pytest.raises(Locked, match=rf"pid {os.getpid()}\) holds the thing"),
        lock(path, "the thing"),
    ):
        raise AssertionError("not reached")
    with lock(path, "the thing"):
        released = threading.Timer(0.1, lambda: None)
        released.start()
    held = path.open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    timer = threading.Timer(0.15, held.close)
    timer.start()
    with lock(path, "the thing", wait_seconds=10):
        assert held.closed
    timer.join()


def test_a_lock_dies_with_its_holder(tmp_path):
    path = tmp_path / "a.lock"
    child = os.fork()
    if not child:
        with lock(path, "x"):
            os._exit(0)
    os.waitpid(child, 0)
    with lock(path, "x"):
        assert path.read_text().strip() == str(os.getpid())
