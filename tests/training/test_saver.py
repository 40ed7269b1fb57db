"""Saving beside the training: what `save` promises when it returns, and what happens when the writer or the disk fails."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from nightschool import uploads
from nightschool.checkpoint_writer.client import writing_lock
from nightschool.config.recipe import Checkpoints
from nightschool.errors import DiskFull, Locked, NightschoolError
from nightschool.events import read_events
from nightschool.store import checkpoints
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.runs import RunStore
from nightschool.training.checkpoint import saver as saver_module
from nightschool.training.checkpoint.checkpoint_reader import group_files, load_group
from nightschool.training.checkpoint.contents import CheckpointContents, sources_of
from nightschool.training.checkpoint.saver import Ranks, open_saver
from nightschool.uploads.journal import Journal
from nightschool.work.host_memory import HostBytes


@pytest.fixture
def run(tmp_path):
    return RunStore(Home(tmp_path)).create({"a": 1}, name="bot")


@pytest.fixture
def lines():
    return []


def tensors_of(step):
    return {
        "a": torch.full((100, 7), float(step)),
        "b": torch.arange(10, dtype=torch.bfloat16).reshape(2, 5).t() * step,  # not contiguous
        "c": torch.tensor(step),
        "d": torch.zeros(0, 3),
        "e": torch.tensor([True, False, True]),
    }


def state_of(step, tensors=None):
    groups = {"model": sources_of(tensors or tensors_of(step))}
    return CheckpointContents(groups, {"notes.txt": f"schön {step}"}, {"step": step})


def save_steps(run, lines, *steps, then=lambda: None, **settings):
    with open_saver(run, Checkpoints(**settings), lines.append) as saver:
        for step in steps:
            saver.save(path_of(run, step), state_of(step))
        then()


def path_of(run, step):
    return checkpoints.checkpoint_path(run, 0, step, 1)


def assert_holds(run, step):
    checkpoints.get(run, path_of(run, step).name).verify(digests=True)
    found = load_file(path_of(run, step) / "model.safetensors")
    for name, tensor in tensors_of(step).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert (path_of(run, step) / "notes.txt").read_text() == f"schön {step}"


def events_of(run):
    return [row["event"] for row in read_events(run.events_path) if row["event"] != "saving"]


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_the_state_at_the_call_whatever_the_next_step_does(run, lines, background):
    with open_saver(run, Checkpoints(background=background), lines.append) as saver:
        saver.expect(10_000)
        tensors = tensors_of(1)
        for step in (1, 2, 3):
            for name, tensor in tensors_of(step).items():
                tensors[name].copy_(tensor)
            saver.save(path_of(run, step), state_of(step, tensors))
            tensors["a"].zero_()
    for step in (1, 2, 3):
        assert_holds(run, step)
    assert events_of(run) == ["checkpoint"] * 3
    assert checkpoints.next_attempt(run) == 2


def test_the_files_are_byte_by_byte_the_same_in_either_process(run):
    for step, background in ((1, True), (2, False)):
        with open_saver(run, Checkpoints(background=background), print) as saver:
            saver.save(path_of(run, step), state_of(7))
    a, b = (path_of(run, step) / "model.safetensors" for step in (1, 2))
    assert a.read_bytes() == b.read_bytes()


def test_large_groups_are_split_and_read_as_one(run, monkeypatch):
    from nightschool.training.checkpoint import contents

    plan = contents.plan_files
    monkeypatch.setattr(contents, "plan_files", lambda stem, facts: plan(stem, facts, limit_bytes=1000))
    with open_saver(run, Checkpoints(), print) as saver:
        saver.save(path_of(run, 1), state_of(1))
    folder = path_of(run, 1)
    assert group_files(folder, "model") == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    found = load_group(folder, "model")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors_of(1).items())
    checkpoints.get(run, folder.name).verify(digests=True)


def test_a_last_save_needs_no_copy(run, monkeypatch):
    monkeypatch.setattr(saver_module.Snapshot, "take", lambda *_: pytest.fail("copied"))
    with open_saver(run, Checkpoints(), print) as saver:
        saver.save(path_of(run, 1), state_of(1), last=True)
        assert_holds(run, 1)


TRAINER = """
    import os, signal, sys, torch
    from pathlib import Path
    from nightschool.config.recipe import Checkpoints
    from nightschool.store import checkpoints
    from nightschool import uploads
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore
    from nightschool.training.checkpoint.saver import Ranks, open_saver
    from nightschool.training.checkpoint.contents import CheckpointContents, sources_of

    run = RunStore(Home(Path(sys.argv[1]))).get(sys.argv[2])
    tensors = {"a": torch.arange(5_000_000, dtype=torch.float32)}
    with open_saver(run, Checkpoints(), print) as saver:
        for step in (1, 2):
            contents = CheckpointContents({"model": sources_of(tensors)}, {}, {"step": step})
            saver.save(checkpoints.checkpoint_path(run, 0, step, 1), contents)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_save_returned_for_is_there_although_the_trainer_was_killed(run, lines):
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINER), run.home.path, run.id], stdout=subprocess.DEVNULL
    )
    assert killed.returncode == -signal.SIGKILL
    with writing_lock(run, lines.append):  # what a resume waits for
        newest = checkpoints.newest_whole(run)
    assert newest.skipped == ()
    assert newest.checkpoint.step == 2
    assert torch.equal(load_group(path_of(run, 2), "model")["a"], torch.arange(5_000_000, dtype=torch.float32))
    assert lines in ([], [f"Waiting for the writer of an earlier process to finish a checkpoint of {run.id}"])


def test_who_resumes_waits_for_the_writer_and_says_so(run, lines):
    with (
        writing_lock(run, lines.append),
        pytest.raises(Locked, match="holds the checkpoints of"),
        writing_lock(run, lines.append, wait_seconds=0.1),
    ):
        pytest.fail("entered")
    assert lines == [f"Waiting for the writer of an earlier process to finish a checkpoint of {run.id}"]


@pytest.mark.parametrize("when", ["idle", "busy"])
def test_a_writer_that_is_killed_is_replaced_and_nothing_is_lost(run, lines, when):
    with open_saver(run, Checkpoints(), lines.append) as saver:
        if when == "busy":  # stopped, it cannot begin before it is killed
            os.kill(saver._writer.pid, signal.SIGSTOP)
        saver.save(path_of(run, 1), state_of(1))
        if when == "idle":
            saver.settle()
        os.kill(saver._writer.pid, signal.SIGKILL)
        os.waitid(os.P_PID, saver._writer.pid, os.WEXITED | os.WNOWAIT)
        saver.save(path_of(run, 2), state_of(2))
        saver.save(path_of(run, 3), state_of(3))
    for step in (1, 2, 3):
        assert_holds(run, step)
    assert events_of(run).count("writer_died") == 1
    assert any("ended with -9" in line for line in lines)


def fill_disk(monkeypatch, tmp_path, step):
    """The writer's disk is full for one checkpoint; the writer is a process of its own, so its Python is told."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        import errno, os
        write = os.write
        def full(handle, content):
            if "step{step}-" in os.readlink(f"/proc/self/fd/{{handle}}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, content)
        os.write = full
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def test_a_full_disk_stops_the_run_at_the_next_save(run, lines, tmp_path, monkeypatch):
    fill_disk(monkeypatch, tmp_path, 2)
    with pytest.raises(DiskFull, match="what was stored before is still whole"):
        save_steps(run, lines, 1, 2, 3)
    assert [point.step for point in checkpoints.ls(run)] == [1]
    assert_holds(run, 1)
    assert events_of(run) == ["checkpoint", "disk_full", "checkpoint_failed"]
    assert not list(run.checkpoints_path.glob("*.partial"))


def test_a_full_disk_at_the_last_save_is_no_success(run, tmp_path, monkeypatch):
    fill_disk(monkeypatch, tmp_path, 1)
    with pytest.raises(DiskFull):
        save_steps(run, [], 1)


def test_a_full_disk_lets_the_run_go_on_if_the_recipe_says_so(run, lines, tmp_path, monkeypatch):
    fill_disk(monkeypatch, tmp_path, 2)
    save_steps(run, lines, 1, 2, 3, on_full_disk="continue")
    assert [point.step for point in checkpoints.ls(run)] == [1, 3]
    assert any("goes on without the checkpoint" in line for line in lines)
    assert events_of(run) == ["checkpoint", "disk_full", "checkpoint_failed", "checkpoint"]


def test_any_other_failure_of_the_writer_stops_the_run(run, lines):
    path_of(run, 1).parent.rmdir()
    path_of(run, 1).parent.write_text("in the way")
    with pytest.raises(NightschoolError):
        save_steps(run, lines, 1, on_full_disk="continue")


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_writer(run, lines, tmp_path, monkeypatch):
    fill_disk(monkeypatch, tmp_path, 1)
    with pytest.raises(ZeroDivisionError):
        save_steps(run, lines, 1, then=lambda: 1 / 0)
    assert events_of(run)[-1] == "checkpoint_failed"


def test_without_memory_for_a_copy_the_run_writes_by_itself_and_says_so(run, lines, monkeypatch):
    monkeypatch.setattr(saver_module, "host_bytes", lambda: HostBytes(1000, 1000))
    with open_saver(run, Checkpoints(), lines.append) as saver:
        for step in (1, 2):
            saver.save(path_of(run, step), state_of(step))
            assert_holds(run, step)
    said = [line for line in lines if re.search("takes .* and 1 kB of memory are left", line)]
    assert len(said) == 1
    assert events_of(run) == ["saving_in_process", "checkpoint", "checkpoint"]


def test_memory_that_was_made_ready_is_not_asked_for_twice(run, lines, monkeypatch):
    with open_saver(run, Checkpoints(), lines.append) as saver:
        saver.expect(50_000_000)
        while saver._memory.allocated_bytes < 50_000_000:
            time.sleep(0.01)
        monkeypatch.setattr(saver_module, "host_bytes", lambda: HostBytes(1000, 1000))
        saver.save(path_of(run, 1), state_of(1))
        assert saver._pending
    assert_holds(run, 1)
    assert events_of(run) == ["checkpoint"]


@pytest.mark.parametrize("what", ["memory", "process"])
def test_what_cannot_be_had_is_done_without(run, lines, monkeypatch, what):
    def fail(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    if what == "memory":
        monkeypatch.setattr("nightschool.checkpoint_writer.shared_buffer.SharedMemory.reserve", fail)
    else:
        monkeypatch.setattr(subprocess, "Popen", fail)
    save_steps(run, lines, 1, 2)
    assert_holds(run, 2)
    assert sum("Cannot allocate memory" in line for line in lines) == 1


def run_with_upload(tmp_path, **upload):
    recipe = {"checkpoints": {"upload": {"url": (tmp_path / "bucket").as_uri(), **upload}}}
    return RunStore(Home(tmp_path / "home").ensure()).create(recipe, name="bot")


def test_an_upload_in_the_foreground_is_done_when_save_returns(tmp_path, lines):
    run = run_with_upload(tmp_path, background=False)
    settings = Checkpoints.model_validate(run.recipe()["checkpoints"])
    with open_saver(run, settings, lines.append) as saver:
        saver.save(path_of(run, 1), state_of(1))
        assert list((tmp_path / "bucket").rglob("manifest.json"))


def test_what_waits_to_be_uploaded_is_not_removed(tmp_path, lines):
    run = run_with_upload(tmp_path)
    settings = Checkpoints.model_validate(run.recipe()["checkpoints"] | {"keep": {"last": 1, "best": 0}})
    home = Home(tmp_path / "home")
    with lock(uploads.uploader_lock_path(home), "the uploads"):  # an uploader that does nothing
        with open_saver(run, settings, lines.append) as saver:
            for step in (1, 2, 3):
                saver.save(path_of(run, step), state_of(step))
        assert [point.step for point in checkpoints.ls(run)] == [1, 2, 3]
        assert len(Journal(home).ls()) == 3


def test_who_was_asked_to_stop_does_not_wait_for_uploads(tmp_path, lines):
    run = run_with_upload(tmp_path, max_pending="1 kB")
    settings = Checkpoints.model_validate(run.recipe()["checkpoints"])
    asked = threading.Event()

    def say(line):
        lines.append(line)
        if "Waiting for uploads" in line:
            asked.set()

    with lock(uploads.uploader_lock_path(Home(tmp_path / "home")), "the uploads"):  # an uploader that does nothing
        with open_saver(run, settings, say, stop=asked.is_set) as saver:
            saver.save(path_of(run, 1), state_of(1))
            saver.settle()
            saver.save(path_of(run, 2), state_of(2))
        assert asked.is_set()
        assert_holds(run, 2)


def test_the_parts_of_two_ranks_are_one_checkpoint(run, lines):
    with (
        open_saver(run, Checkpoints(), lines.append, ranks=Ranks(1, 2)) as other,
        open_saver(run, Checkpoints(), lines.append, ranks=Ranks(0, 2)) as first,
    ):
        for step in (1, 2):
            sources = sources_of({"m": torch.ones(3) * step})
            part = CheckpointContents({"optimizer-rank1": sources}, {}, {"step": step})
            other.save(path_of(run, step), part)
            first.save(path_of(run, step), state_of(step))
        other.settle()
        assert_holds(run, 2)
    for step in (1, 2):
        assert_holds(run, step)
        assert load_group(path_of(run, step), "optimizer-rank1")["m"].tolist() == [step] * 3


def test_how_long_training_stood_still_is_written_down(run, lines):
    save_steps(run, lines, 1, 2)
    rows = [row for row in read_events(run.events_path) if row["event"] == "saving"]
    assert [(row["step"], row["background"]) for row in rows] == [(1, True), (2, True)]
    assert all(0 < row["stalled_seconds"] < 10 for row in rows)
