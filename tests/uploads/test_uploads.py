"""Uploads: the journal, one attempt after the other, and the uploader process."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nightschool import uploads
from nightschool.config.checkpoints import Upload
from nightschool.errors import Conflict, NotFound, UsageError
from nightschool.events import read_events
from nightschool.jobs.uploader import main as uploader
from nightschool.remotes import open_remote
from nightschool.store import tables
from nightschool.store.home import Home
from nightschool.store.manifest import write_manifest
from nightschool.store.runs import RunStore
from nightschool.uploads.journal import Journal
from nightschool.uploads.layout import Pointer, move_pointer, read_pointer
from nightschool.work.identity import ProcessIdentity
from tests.support.live_server import eventually
from tests.support.object_stores import add_checkpoint, make_run, moto, s3  # noqa: F401
from tests.support.store_databases import db, environment, postgres, postgres_url  # noqa: F401


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/bucket"


@pytest.fixture
def run(home, url):
    return make_run(home, upload=url)


def drain(home, code=0):
    assert uploader(["--home", str(home.path), "--drain", "--timeout-seconds", "5"]) == code


def assert_equal(run, path, url):
    """The bucket holds the checkpoint, file by file."""
    remote = open_remote(url)
    key = f"{run.id}/{path.name}"
    assert {found.key for found in remote.list(key)} == {f"{key}/{file.name}" for file in path.iterdir()}
    for file in path.iterdir():
        assert remote.read(f"{key}/{file.name}").data == file.read_bytes()


def test_what_is_committed_is_pending_until_it_is_uploaded(home, run, url):
    path = add_checkpoint(run, 10)
    assert uploads.is_pending(home, path)  # no row yet, but the recipe wants one
    upload = Journal(home).enqueue(path, Upload(url=url))
    assert (upload.state, upload.step, upload.name) == ("queued", 10, path.name)
    assert uploads.is_pending(home, path)
    assert Journal(home).bytes_left() == upload.size_bytes > 40_000
    drain(home)
    assert not uploads.is_pending(home, path)
    assert Journal(home).bytes_left() == 0
    assert_equal(run, path, url)
    assert [event["name"] for event in read_events(run.events_path) if event["event"] == "uploaded"] == [path.name]


def test_entering_twice_is_the_same_as_once(home, run, url):
    path = add_checkpoint(run, 10)
    first = Journal(home).enqueue(path, Upload(url=url))
    assert Journal(home).enqueue(path, Upload(url=url + "/")) == first
    drain(home)
    assert Journal(home).enqueue(path, Upload(url=url)).state == "done"


def test_a_run_that_uploads_nothing_has_nothing_pending(home):
    run = make_run(home)
    path = add_checkpoint(run, 10)
    assert uploads.settings_of(run) is None
    assert not uploads.is_pending(home, path)
    assert uploads.reconcile(home) == []
    uploads.after_commit(run, path, say=print)
    assert Journal(home).ls() == []


def test_whoever_uploads_nothing_needs_no_database(home):
    assert not uploads.is_pending(home, add_checkpoint(make_run(home), 10))
    assert not home.state_db.exists()


def test_what_has_no_manifest_or_address_is_refused(home, run, url):
    path = add_checkpoint(run, 10)
    with pytest.raises(UsageError):
        Journal(home).enqueue(path, Upload(url="somewhere"))
    (path / "manifest.json").unlink()
    with pytest.raises(NotFound):
        Journal(home).enqueue(path, Upload(url=url))
    assert not uploads.is_pending(home, path)


def test_a_crash_between_commit_and_journal_is_made_good(home, run, url):
    paths = [add_checkpoint(run, step) for step in (10, 20)]
    drain(home)
    for path in paths:
        assert_equal(run, path, url)
    assert uploads.reconcile(home) == []


def test_the_pointer_names_the_newest_and_never_goes_back(home, run, url):
    remote = open_remote(url)
    add_checkpoint(run, 20)
    drain(home)
    add_checkpoint(run, 10)
    drain(home)
    assert read_pointer(remote).step == 20
    assert read_pointer(remote, f"{run.id}/LATEST.json").step == 20
    later = make_run(home, minutes=1, upload=url)
    path = add_checkpoint(later, 5)
    drain(home)
    pointer = read_pointer(remote)
    assert (pointer.run_id, pointer.key) == (later.id, f"{later.id}/{path.name}")
    assert read_pointer(remote, f"{run.id}/LATEST.json").step == 20


def test_the_manifest_comes_after_its_data_and_weights_before_the_optimizer(home, run, url, monkeypatch):
    from nightschool.remotes.local import LocalStore

    order = []
    for name in ("put_file", "swap"):
        original = getattr(LocalStore, name)

        def told(self, key, *rest, original=original):
            order.append(key.rpartition("/")[2])
            return original(self, key, *rest)

        monkeypatch.setattr(LocalStore, name, told)
    add_checkpoint(run, 10)
    drain(home)
    assert order == ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", *["LATEST.json"] * 2]


def test_a_checkpoint_that_was_altered_on_the_disk_is_not_uploaded(home, run, url):
    path = add_checkpoint(run, 10)
    Journal(home).enqueue(path, Upload(url=url))
    weights = path / "model.safetensors"
    weights.write_bytes(b"X" + weights.read_bytes()[1:])
    drain(home, code=1)
    (upload,) = Journal(home).ls()
    assert (upload.state, upload.error_code) == ("failed", "damaged")
    assert not open_remote(url).exists(f"{run.id}/{path.name}/manifest.json")
    assert uploads.is_pending(home, path)


def test_a_checkpoint_that_vanished_fails_and_says_so(home, run, url):
    path = add_checkpoint(run, 10)
    Journal(home).enqueue(path, Upload(url=url))
    shutil.rmtree(path)
    drain(home, code=1)
    assert Journal(home).ls()[0].error_code == "not_found"


def test_another_checkpoint_of_the_name_in_the_bucket_is_refused_with_both_shown(home, run, url):
    path = add_checkpoint(run, 10)
    other = write_manifest(home.path.parent, step=10, attempt=1)
    theirs = (home.path.parent / "manifest.json").read_bytes()
    remote = open_remote(url)
    remote.put_if_absent(f"{run.id}/{path.name}/manifest.json", theirs)
    drain(home, code=1)
    (upload,) = Journal(home).ls()
    assert upload.error_code == "conflict"
    assert other.created_at.isoformat() in upload.error
    assert str(path) in upload.error
    assert remote.read(f"{run.id}/{path.name}/manifest.json").data == theirs


def test_a_manifest_or_pointer_that_was_altered_on_its_way_is_replaced(home, run, url):
    path = add_checkpoint(run, 10)
    remote = open_remote(url)
    remote.put_if_absent(f"{run.id}/{path.name}/manifest.json", b"\0" + (path / "manifest.json").read_bytes()[1:])
    remote.put_if_absent("LATEST.json", b"{}")
    later = make_run(home, minutes=1, upload=url)
    ahead = Pointer(later.id, "x", "y", 10**9, 9, "d", "2026")
    move_pointer(remote, f"{run.id}/LATEST.json", ahead)
    altered = remote.read(f"{run.id}/LATEST.json")
    remote.compare_and_swap(f"{run.id}/LATEST.json", altered.data.replace(b'"y"', b'"z"'), altered.etag)
    drain(home)
    assert read_pointer(remote, f"{run.id}/LATEST.json").step == 10
    assert_equal(run, path, url)
    assert read_pointer(remote).step == 10


def test_a_checkpoint_that_a_later_attempt_wrote_again_takes_the_place_of_the_old(home, run, url):
    add_checkpoint(run, 10, attempt=1)
    drain(home)
    path = add_checkpoint(run, 10, attempt=2, replace=True, text=b"again")
    (path / "rest.json").write_text("{}")
    write_manifest(path, step=10, attempt=2)
    assert uploads.is_pending(home, path)
    drain(home)
    assert_equal(run, path, url)
    assert not uploads.is_pending(home, path)
    path = add_checkpoint(run, 10, attempt=3, replace=True)  # without that file
    drain(home)
    assert_equal(run, path, url)


def test_one_checkpoint_may_go_to_two_places(home, run, url, tmp_path):
    path = add_checkpoint(run, 10)
    drain(home)
    other = f"file://{tmp_path}/other"
    Journal(home).enqueue(path, Upload(url=other))
    assert uploads.is_pending(home, path)
    drain(home)
    assert_equal(run, path, other)


def test_of_two_processes_one_gets_an_upload_and_a_dead_one_loses_it(home, run, url, environment, monkeypatch):  # noqa: F811
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    journal = Journal(home)
    journal.enqueue(add_checkpoint(run, 10), Upload(url=url))
    mine = journal.claim()
    assert mine.lease.owner == ProcessIdentity.mine()
    with home.database.write() as connection:
        elsewhere = str(ProcessIdentity.of(os.getppid()))
        connection.execute(tables.uploads.update().values(owner=elsewhere))
    assert journal.claim() is None  # held, by a process that lives
    with home.database.write() as connection:
        connection.execute(tables.uploads.update().values(owner=mine.owner))
    journal.give_back(mine)
    code = (
        "import sys; from pathlib import Path;"
        "from nightschool.store.home import Home; from nightschool.uploads.journal import Journal;"
        "home = Home(Path(sys.argv[1])); Journal(home).claim() or sys.exit(3)"
    )
    subprocess.run([sys.executable, "-c", code, home.path], check=True)
    (row,) = journal.ls()
    assert (row.state, row.attempts) == ("running", 1)
    taken = journal.claim()  # its process is dead
    assert taken.attempts == 2
    journal.finish(taken)
    with pytest.raises(Conflict):
        journal.note_file(mine, "model.safetensors", sent_bytes=1)


def test_an_uploader_that_is_started_outlives_its_parent_and_ends(home, run, url):
    path = add_checkpoint(run, 10)
    code = (
        "import sys; from pathlib import Path; from nightschool import uploads;"
        "from nightschool.store.home import Home; from nightschool.store.runs import RunStore;"
        "home = Home(Path(sys.argv[1])); uploads.after_commit(RunStore(home).ls()[0], Path(sys.argv[2]), say=print);"
        "assert 'torch' not in sys.modules; assert 'obstore' not in sys.modules; print(uploads._started[0].pid)"
    )
    out = subprocess.run([sys.executable, "-c", code, home.path, path], check=True, capture_output=True, text=True)
    pid = int(out.stdout.split()[-1])
    try:
        deadline = time.monotonic() + 60
        while uploads.is_pending(home, path):
            assert time.monotonic() < deadline, uploads.uploader_log_path(home).read_text()
            time.sleep(0.05)
        assert uploads.ensure_uploader(home) is None  # it waits a while for more
    finally:
        os.kill(pid, signal.SIGTERM)
    assert_equal(run, path, url)
    assert "Successfully uploaded" in uploads.uploader_log_path(home).read_text()


def test_a_trainer_can_wait_for_its_upload(home, url):
    run = make_run(home, upload={"url": url, "background": False})
    path = add_checkpoint(run, 10)
    said = []
    uploads.after_commit(run, path, say=said.append)
    assert not uploads.is_pending(home, path)
    assert_equal(run, path, url)
    assert any("Successfully uploaded" in line for line in said)


def test_a_failed_upload_never_stops_who_commits(home):
    run = make_run(home, upload={"url": "s3://bucket/{x}", "background": False})
    said = []
    path = add_checkpoint(run, 10)
    (path / "manifest.json").write_text("{}")
    uploads.after_commit(run, path, say=said.append)
    assert said
    assert said[0].startswith("Not uploaded")


def test_s3_end_to_end(home, s3):  # noqa: F811
    url = f"s3://bucket/{home.path.parent.name}"
    run = make_run(home, upload=url)
    path = add_checkpoint(run, 10, num_bytes=9 << 20)
    drain(home)
    assert_equal(run, path, url)
    assert read_pointer(open_remote(url)).key == f"{run.id}/{path.name}"


def test_an_open_database_is_no_need_for_torch_or_clients(home, run, url):
    code = "import sys, nightschool.uploads; assert not {'torch', 'obstore', 'google', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    home.database.connect()
    assert Journal(home).ls() == []


def test_what_belonged_to_a_removed_run_leaves_the_journal(home, run, url):
    Journal(home).enqueue(add_checkpoint(run, 1), Upload(url=url))
    other = make_run(home, minutes=1)
    Journal(home).enqueue(add_checkpoint(other, 1), Upload(url=url))
    RunStore(home).remove(other.id)
    drain(home)
    assert [row.run_id for row in Journal(home).ls()] == [run.id]


def test_a_mistake_in_one_upload_does_not_keep_others_from_going(home, run, url, monkeypatch):
    from nightschool.uploads import push

    broken, good = add_checkpoint(run, 10), add_checkpoint(run, 20)
    send = push._send

    def failing(journal, upload, *rest):
        if upload.step == 10:
            raise ZeroDivisionError("oops")
        return send(journal, upload, *rest)

    monkeypatch.setattr(push, "_send", failing)
    monkeypatch.setattr(push, "_TRIES_UNTIL_MENDED", 2)
    drain(home, code=1)
    states = {row.path: row for row in Journal(home).ls()}
    assert states[str(good)].state == "done"
    assert states[str(broken)].state == "failed"
    assert "ZeroDivisionError: oops" in states[str(broken)].error


def test_an_uploader_ends_with_its_home(home, run, url):
    path = add_checkpoint(run, 1)
    Journal(home).enqueue(path, Upload(url=url))
    pid = uploads.ensure_uploader(home)
    eventually(lambda: not uploads.is_pending(home, path))
    time.sleep(0.2)
    shutil.rmtree(home.path)
    (process,) = [one for one in uploads._started if one.pid == pid]
    assert process.wait(20) == 0
    assert not home.path.exists()


def test_an_uploader_is_started_anew_with_the_environment_of_who_asks(home, run, url):
    path = add_checkpoint(run, 1)
    Journal(home).enqueue(path, Upload(url=url))
    old = uploads.ensure_uploader(home)
    eventually(lambda: not uploads.is_pending(home, path))
    new = uploads.restart_uploader(home)
    assert new not in (None, old)
    os.kill(new, signal.SIGTERM)
    Home(home.path / "empty").ensure()
    fresh = uploads.restart_uploader(Home(home.path / "empty"))  # where none ran
    os.kill(fresh, signal.SIGKILL)
    for process in uploads._started:
        process.wait(20)
