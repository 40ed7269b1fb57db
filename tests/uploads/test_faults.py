"""Uploads through a network that fails, with uploaders that are killed, and with credentials that are not accepted."""

import hashlib
import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from benchmarks.fault_proxy import fault_proxy

from nightschool import uploads
from nightschool.config.checkpoints import Upload
from nightschool.errors import CredentialsRefused, RemoteError, Unreachable
from nightschool.jobs.uploader import main as uploader
from nightschool.remotes import open_remote
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.uploads.journal import Journal
from tests.support.object_stores import add_checkpoint, gcp_emulator, make_run, moto, request, resumable_gs, s3  # noqa: F401


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


def port_of(url):
    return int(url.rpartition(":")[2])


def start_uploader(home, *more):
    command = [sys.executable, "-m", "nightschool.jobs.uploader", "--home", str(home.path), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_all_there(run, url):
    remote = open_remote(url)
    for path in run.checkpoints_path.iterdir():
        for file in path.iterdir():
            assert remote.read(f"{run.id}/{path.name}/{file.name}").data == file.read_bytes()


def test_everything_arrives_through_a_network_that_fails(home, s3, monkeypatch):  # noqa: F811
    url = f"s3://bucket/{home.path.parent.name}"
    run = make_run(home, upload=url)
    for step in (1, 2, 3, 4):
        add_checkpoint(run, step, num_bytes=9_000_000 if step == 2 else 50_000)
    with fault_proxy(port_of(s3), share=0.2, seed=3, stall_seconds=1.5) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert uploader(["--home", str(home.path), "--drain", "--timeout-seconds", "1"]) == 0
    assert sum(one.fault is not None for one in proxy.exchanges) >= 5
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    assert_all_there(run, url)


def test_a_dead_network_is_tried_again_with_pauses_that_grow(home, s3, monkeypatch):  # noqa: F811
    run = make_run(home, upload="s3://bucket/x")
    add_checkpoint(run, 1)
    uploads.reconcile(home)
    with fault_proxy(port_of(s3), share=1.0, stall_seconds=0.1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        (row,) = Journal(home).ls()
        failed = uploads.push_now(home, row.folder, Upload(url=row.url), say=print, give_up_seconds=0.0)
    assert (failed.state, failed.error_code, failed.attempts) == ("queued", "unreachable", 1)
    journal = Journal(home)
    pauses = []
    for attempts in (1, 4, 60):
        claimed = journal.claim(row.id)
        journal.fail(vars_with(claimed, attempts=attempts), Unreachable("no"), for_good=False)
        pauses.append(journal.seconds_to_next())
    assert pauses[0] <= 1 < pauses[1] <= 8 < 100 < pauses[2] <= 300


def vars_with(upload, **changes):
    import dataclasses

    return dataclasses.replace(upload, **changes)


def test_an_uploader_that_is_killed_again_and_again_loses_nothing(home, s3):  # noqa: F811
    url = f"s3://bucket/{home.path.parent.name}"
    run = make_run(home, upload=url)
    rng = random.Random(0)
    for step in range(1, 7):
        add_checkpoint(run, step, num_bytes=2_000_000)
    uploads.reconcile(home)
    with Database(home).connect() as db:  # slow enough to be hit in the middle
        from nightschool.store.tables import uploads as table

        with db.write() as connection:
            connection.execute(table.update().values(bandwidth=20_000_000))
    for _ in range(5):
        process = start_uploader(home)
        wait_until(lambda: any(row.state == "running" for row in Journal(home).ls()) or not Journal(home).bytes_left())
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert uploader(["--home", str(home.path), "--drain"]) == 0
    assert_all_there(run, url)
    assert open_remote(url).exists("LATEST.json")


def test_an_uploader_that_is_asked_to_stop_gives_back_what_it_has(home, tmp_path):
    run = make_run(home)
    path = add_checkpoint(run, 1, num_bytes=3_000_000)
    Journal(home).enqueue(path, Upload(url=f"file://{tmp_path}/bucket", bandwidth=500_000))
    process = start_uploader(home)
    wait_until(lambda: Journal(home).ls()[0].state == "running")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    (row,) = Journal(home).ls()
    assert (row.state, row.attempts, row.owner) == ("queued", 0, None)
    assert not list((tmp_path / "bucket").rglob("*.safetensors"))


def test_an_upload_to_google_goes_on_after_a_kill_where_it_was(home, resumable_gs, monkeypatch):  # noqa: F811
    size = 40 << 20
    url = f"gs://bucket/{home.path.parent.name}"
    run = make_run(home, upload=url)
    path = add_checkpoint(run, 1, num_bytes=1000)
    (path / "model.safetensors").write_bytes(os.urandom(size))
    from nightschool.store.manifest import write_manifest

    write_manifest(path, step=1, attempt=1)
    Journal(home).enqueue(path, Upload(url=url, bandwidth=30_000_000))
    with fault_proxy(port_of(resumable_gs), share=0.0) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        process = start_uploader(home)
        sent = lambda: sum(one.body_bytes for one in proxy.exchanges if one.method == "PUT")  # noqa: E731
        wait_until(lambda: sent() >= 16 << 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert uploader(["--home", str(home.path), "--drain"]) == 0
        assert size <= sent() <= size + (9 << 20)
        assert_all_there(run, url)


@pytest.fixture
def refusing():
    """The address of a server that refuses everything with the status and the code that are put into it."""
    answer = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def refuse(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            body = f"<Error><Code>{answer['code']}</Code><Message>no</Message></Error>".encode()
            self.send_response(answer["status"])
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = refuse

        def log_message(self, *_):
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "ExpiredToken", CredentialsRefused),
        (403, "SignatureDoesNotMatch", CredentialsRefused),
        (403, "AccessDenied", CredentialsRefused),
        (400, "InvalidArgument", RemoteError),
    ],
)
def test_what_a_store_refuses_is_told_apart(refusing, s3, monkeypatch, tmp_path, status, code, kind):  # noqa: F811
    url, answer = refusing
    answer.update(status=status, code=code)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(kind) as caught:
        open_remote("s3://bucket", timeout_seconds=2).put_file("k", tmp_path / "f")
    assert type(caught.value) is kind
    assert code in str(caught.value)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    with pytest.raises(RemoteError):
        open_remote("gs://bucket", timeout_seconds=1).put_if_absent("k", b"")


def test_wrong_keys_are_told_apart_from_a_missing_bucket_and_heal(home, s3, monkeypatch):  # noqa: F811
    run = make_run(home, upload="s3://bucket/keys")
    path = add_checkpoint(run, 1)
    request("POST", f"{s3}/moto-api/reset-auth", b"0")  # from now on keys are looked up
    try:
        with pytest.raises(CredentialsRefused, match=r"InvalidAccessKeyId.*AWS_ACCESS_KEY_ID"):
            list(open_remote("s3://bucket").list())
        uploads.reconcile(home)
        (row,) = Journal(home).ls()
        from nightschool.uploads.push import attempt

        journal = Journal(home)
        for tried in range(1, 6):
            failed = attempt(journal, journal.claim(row.id), say=print)
            assert (failed.attempts, failed.error_code) == (tried, "credentials_refused")
        assert failed.state == "failed"
        assert uploads.is_pending(home, path)
    finally:
        request("POST", f"{s3}/moto-api/reset-auth", b"inf")
    later = add_checkpoint(run, 2)  # what arrives shows that the keys do again
    assert uploader(["--home", str(home.path), "--drain"]) == 0
    assert not uploads.is_pending(home, path)
    assert not uploads.is_pending(home, later)


def test_a_run_waits_until_enough_is_uploaded(home, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "_POLL_SECONDS", 0.01)
    run = make_run(home)
    for step in (1, 2):
        path = add_checkpoint(run, step)
        Journal(home).enqueue(path, Upload(url=f"file://{tmp_path}/bucket"))
    pending = Journal(home).bytes_left()
    drained = threading.Thread(target=lambda: uploader_in_thread(home))
    monkeypatch.setattr(uploads, "ensure_uploader", lambda _: drained.start() if not drained.ident else None)
    said = []
    assert uploads.wait_for_room(home, pending, say=said.append)
    assert not drained.ident
    assert uploads.wait_for_room(home, pending // 4, say=said.append)
    drained.join()
    assert len(said) == 1
    assert "Waiting for uploads" in said[0]


def uploader_in_thread(home):
    from nightschool.jobs.uploader import serve
    from nightschool.work.stop import Stop

    serve(home, idle_seconds=0, timeout_seconds=5, stop=Stop(), say=print)


def test_a_run_does_not_wait_for_what_has_failed_or_for_ever(home, monkeypatch):
    monkeypatch.setattr(uploads, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(uploads, "ensure_uploader", lambda _: None)
    run = make_run(home)
    path = add_checkpoint(run, 1)
    upload = Journal(home).enqueue(path, Upload(url="s3://bucket/x"))
    assert not uploads.wait_for_room(home, 1, say=print, give_up_seconds=0.05)
    assert not uploads.wait_for_room(home, 1, say=print, stop=lambda: True)
    journal = Journal(home)
    journal.fail(journal.claim(upload.id), Unreachable("no"), for_good=True)
    assert uploads.wait_for_room(home, 1, say=print)
    assert Journal(home).bytes_left() > 1


def test_a_clock_that_was_put_back_makes_nobody_wait(home):
    run = make_run(home)
    upload = Journal(home).enqueue(add_checkpoint(run, 1), Upload(url="s3://bucket/x"))
    with Database(home).connect() as db:
        from nightschool.store.tables import uploads as table

        with db.write() as connection:
            connection.execute(table.update().values(next_try_at=upload.next_try_at + timedelta(days=1)))
        assert Journal(home).seconds_to_next() == 0
        assert Journal(home).claim() is not None


def test_a_download_goes_on_as_long_as_it_gets_on(s3, tmp_path, monkeypatch):  # noqa: F811
    content = os.urandom(9 << 20)
    (tmp_path / "source").write_bytes(content)
    open_remote(f"s3://bucket/{tmp_path.name}").put_file("a", tmp_path / "source")
    with fault_proxy(port_of(s3), share=0.4, seed=6, stall_seconds=1.2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        remote = open_remote(f"s3://bucket/{tmp_path.name}", timeout_seconds=1)
        for name in ("one", "two", "three"):
            got = remote.get_to_file("a", tmp_path / name, sha256=hashlib.sha256(content).hexdigest())
            assert got.read_bytes() == content
    assert any(one.fault for one in proxy.exchanges)


def test_a_broken_stream_is_gone_on_with_where_it_ended(tmp_path, monkeypatch):
    from nightschool.remotes.local import LocalStore

    content = os.urandom(50_000)
    remote = open_remote(f"file://{tmp_path}/bucket")
    remote.put_if_absent("a", content)
    starts, original = [], LocalStore.stream

    def stream(self, key, start, etag):
        starts.append(start)
        yield original(self, key, start, etag).__next__()[:10_000]
        raise Unreachable("broken off")

    monkeypatch.setattr(LocalStore, "stream", stream)
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert remote.get_to_file("a", tmp_path / "got").read_bytes() == content
    assert starts == [0, 10_000, 20_000, 30_000, 40_000, 50_000][: len(starts)]
    assert len(starts) >= 5


def test_a_run_that_stops_waits_for_its_uploads_but_not_for_ever(home, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/bucket"
    run = make_run(home, upload={"url": url, "wait_at_stop": "300ms"})
    said = []
    assert uploads.wait_at_stop(run, say=said.append)  # nothing is under way
    upload = Journal(home).enqueue(add_checkpoint(run, 1), Upload(url=url))
    monkeypatch.setattr(uploads, "ensure_uploader", lambda _: None)
    assert not uploads.wait_at_stop(run, say=said.append)
    assert said == [
        "Waiting up to 0.3 s for 1 uploads",
        "1 uploads are left; they go on in the background, or with nightschool uploads retry",
    ]
    monkeypatch.setattr(uploads, "ensure_uploader", lambda _: uploader_in_thread(home))
    assert uploads.wait_at_stop(run, say=said.append)
    assert Journal(home).ls(path=upload.folder)[0].state == "done"
    home.database.close()
    home.state_db.write_bytes(b"no database")
    assert not uploads.wait_at_stop(run, say=said.append)
    assert uploads.is_pending(home, upload.folder)  # a doubt keeps it
