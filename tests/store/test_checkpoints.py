"""Checkpoints: order by step, the newest whole one, and retention that never takes the last."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.config.checkpoints import Keep
from nightschool.errors import MadeByNewer, NotFound
from nightschool.store import checkpoints
from nightschool.store.atomic import publish_directory
from nightschool.store.home import Home
from nightschool.store.manifest import write_manifest
from nightschool.store.runs import RunStore


@pytest.fixture
def run(tmp_path):
    return RunStore(Home(tmp_path)).create({"a": 1}, name="bot")


def save(run, step, *, loss=None, epoch=0, **facts):
    path = checkpoints.checkpoint_path(run, epoch, step, 1)
    with publish_directory(path, replace=True) as folder:
        (folder / "weights").write_bytes(b"w" * 100)
        write_manifest(folder, heldout_loss=loss, **facts)
    return path


def steps(points):
    return [point.step for point in points]


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 10**12), st.integers(0, 10**6))
def test_names_go_and_come(epoch, step, num_files):
    from pathlib import Path

    point = checkpoints.parse_checkpoint(Path("x") / checkpoints.checkpoint_name(epoch, step, num_files))
    assert (point.epoch, point.step, point.num_files) == (epoch, step, num_files)


def test_the_list_is_by_step_as_a_number(run):
    for step in (1000, 9, 10, 200):
        save(run, step)
    (run.checkpoints_path / "checkpoint-epoch0-step11-files1").mkdir()  # never finished
    (run.checkpoints_path / "checkpoint-epoch0-step12-files1.partial").mkdir()
    (run.checkpoints_path / "notes.txt").write_text("x")
    assert steps(checkpoints.ls(run)) == [9, 10, 200, 1000]
    assert checkpoints.get(run, "checkpoint-epoch0-step10-files1").step == 10
    with pytest.raises(NotFound, match="checkpoint-epoch0-step1000-files1"):
        checkpoints.get(run, "checkpoint-epoch0-step11-files1")


def test_the_newest_whole_one_says_what_it_skipped(run):
    for step in (1, 2, 3, 4):
        save(run, step)
    os.truncate(checkpoints.checkpoint_path(run, 0, 4, 1) / "weights", 50)
    (checkpoints.checkpoint_path(run, 0, 3, 1) / "weights").write_bytes(b"v" * 100)
    newest = checkpoints.newest_whole(run)
    assert newest.checkpoint.step == 2
    assert steps(skipped.checkpoint for skipped in newest.skipped) == [4, 3]
    assert "has 50 bytes, but its manifest says 100" in newest.skipped[0].why
    assert "SHA-256" in newest.skipped[1].why
    assert checkpoints.newest_whole(run, digests=False).checkpoint.step == 3


def test_without_any_there_is_none(run):
    assert checkpoints.newest_whole(run) == checkpoints.Newest(None, ())
    assert checkpoints.apply_retention(run, Keep(last=1, best=1)) == []


def test_retention_keeps_the_newest_and_the_best(run):
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 1.0), (5, 2.0), (6, 2.5), (7, 9.0)):
        save(run, step, loss=loss)
    removed = checkpoints.apply_retention(run, Keep(last=2, best=1))
    assert steps(removed) == [1, 2, 3, 5]
    assert steps(checkpoints.ls(run)) == [4, 6, 7]  # of the two best, the one that learned longer


def test_a_damaged_one_does_not_push_out_the_only_whole_one(run):
    save(run, 1)
    for step in (2, 3):
        os.truncate(save(run, step) / "weights", 10)
    checkpoints.apply_retention(run, Keep(last=1, best=0))
    assert checkpoints.newest_whole(run).checkpoint.step == 1
    save(run, 4)
    checkpoints.apply_retention(run, Keep(last=1, best=0))
    assert steps(checkpoints.ls(run)) == [2, 3, 4]  # what is damaged is left for its owner to look at
    assert checkpoints.newest_whole(run).checkpoint.step == 4


@settings(max_examples=40, deadline=None)
@given(
    points=st.lists(st.tuples(st.booleans(), st.none() | st.floats(0, 10)), min_size=1, max_size=8),
    keep_last=st.integers(1, 4),
    keep_best=st.integers(0, 3),
)
def test_retention_never_takes_the_newest_whole_one(tmp_path_factory, points, keep_last, keep_best):
    run = RunStore(Home(tmp_path_factory.mktemp("home"))).create({"a": 1}, name="bot")
    for step, (whole, loss) in enumerate(points):
        path = save(run, step, loss=loss)
        if not whole:
            (path / "weights").unlink()
    before = checkpoints.newest_whole(run).checkpoint
    checkpoints.apply_retention(run, Keep(last=keep_last, best=keep_best))
    assert checkpoints.newest_whole(run).checkpoint == before
    num_whole = sum(whole for whole, _ in points)
    kept = [point for point in checkpoints.ls(run) if points[point.step][0]]
    assert min(num_whole, keep_last) <= len(kept) <= min(num_whole, keep_last + keep_best)


def test_retention_sweeps_what_dead_writers_left(run):
    save(run, 1)
    dead = run.checkpoints_path / "checkpoint-epoch0-step2-files1.partial"
    dead.mkdir()
    with publish_directory(checkpoints.checkpoint_path(run, 0, 3, 1)) as folder:
        checkpoints.apply_retention(run, Keep(last=1, best=0))
        assert folder.exists()
        assert not dead.exists()


def test_milestones_stay_for_ever(run):
    for step in range(300, 3000, 300):
        save(run, step)
        checkpoints.apply_retention(run, Keep(last=1, best=0, every="1000 steps"))
    assert steps(checkpoints.ls(run)) == [1200, 2100, 2700]
    for epoch in range(5):
        save(run, 3000 + epoch, epoch=epoch)
        checkpoints.apply_retention(run, Keep(last=1, best=0, every="2 epochs"))
    assert [point.epoch for point in checkpoints.ls(run)] == [2, 4]


def test_what_must_be_uploaded_stays_until_it_is(run):
    for step in (1, 2, 3):
        save(run, step)
    waiting = checkpoints.checkpoint_path(run, 0, 1, 1)
    assert steps(checkpoints.apply_retention(run, Keep(last=1, best=0), is_pending=lambda path: path == waiting)) == [2]
    assert steps(checkpoints.apply_retention(run, Keep(last=1, best=0))) == [1]


def test_what_a_run_left_behind_when_it_went_back_is_not_its_newest(run):
    """Resumed from step 2, it saves 3 again; 4 and 5 belong to what it gave up, and 3 would be the first to go."""
    for step in (1, 2, 3, 4, 5):
        save(run, step, attempt=1)
    assert checkpoints.next_attempt(run) == 2
    save(run, 3, attempt=2)
    assert checkpoints.newest_whole(run).checkpoint.step == 3
    assert steps(checkpoints.apply_retention(run, Keep(last=2, best=0))) == [1, 2, 4]
    assert steps(checkpoints.ls(run)) == [3, 5]
    assert steps(checkpoints.by_age(checkpoints.ls(run))) == [5, 3]


def test_one_made_by_a_newer_version_is_not_passed_over_silently(run, monkeypatch):
    from nightschool.store import manifest

    save(run, 1)
    monkeypatch.setattr(manifest, "_FORMAT", 2)
    save(run, 2)
    monkeypatch.undo()
    with pytest.raises(MadeByNewer, match=r"has the format 2.*reads 1"):
        checkpoints.newest_whole(run)
