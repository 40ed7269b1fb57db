"""Remotes: what each kind of store must do, on folders, memory and S3, and how its errors are told apart."""

import hashlib
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.errors import (
    BucketMissing,
    Conflict,
    CredentialsRefused,
    Damaged,
    NameRefused,
    NotFound,
    Unreachable,
    UsageError,
)
from nightschool.remotes import Throttle, Transfer, open_remote, parse_url
from nightschool.store.names import check_key, path_below
from tests.support.object_stores import az, azurite, fake_gcs, free_port, gcp_emulator, gs, moto, resumable_gs, s3  # noqa: F401

LARGE = os.urandom(9 << 20)  # more than one part


@pytest.fixture(params=["file", "memory", "s3", "gs", "az"])
def remote(request, tmp_path):
    """An empty folder of each kind of store."""
    if request.param == "file":
        (tmp_path / "bucket").mkdir()
        return open_remote(f"file://{tmp_path}/bucket")
    if request.param == "memory":
        return open_remote(f"memory://{request.node.nodeid.__hash__():x}/folder".replace("-", "m"))
    request.getfixturevalue(request.param)
    return open_remote(f"{request.param}://bucket/{tmp_path.name}")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(LARGE)
    return path


@pytest.mark.parametrize("size_bytes", [0, 1, 8 << 20, len(LARGE)])
def test_what_was_put_is_got(remote, tmp_path, size_bytes):
    path = tmp_path / "source"
    path.write_bytes(LARGE[:size_bytes])
    counted = []
    digest = hashlib.sha256(LARGE[:size_bytes]).hexdigest()
    etag = remote.put_file("a/b.bin", path, Transfer(on_bytes=counted.append, sha256=digest))
    assert sum(counted) == size_bytes
    assert remote.head("a/b.bin").etag == etag
    assert remote.head("a/b.bin").size_bytes == size_bytes
    got = remote.get_to_file("a/b.bin", tmp_path / "got" / "b.bin", sha256=digest, size_bytes=size_bytes)
    assert got.read_bytes() == LARGE[:size_bytes]
    assert [path.name for path in got.parent.iterdir()] == ["b.bin"]


def test_putting_again_replaces(remote, source, tmp_path):
    remote.put_file("a", source)
    (tmp_path / "other").write_bytes(b"other")
    remote.put_file("a", tmp_path / "other")
    assert remote.read("a").data == b"other"


def test_a_file_that_is_not_what_it_should_be_never_appears(remote, source):
    with pytest.raises(Damaged, match="altered on this disk"):
        remote.put_file("a", source, Transfer(sha256="0" * 64))
    assert not remote.exists("a")


def test_a_transfer_that_is_stopped_leaves_nothing_that_can_be_read(remote, source):
    class Stopped(Exception):
        pass

    def stop(_):
        raise Stopped

    with pytest.raises(Stopped):
        remote.put_file("a", source, Transfer(on_bytes=stop))
    assert not remote.exists("a")


def test_what_must_be_absent_is_created_once(remote):
    remote.put_if_absent("m", b"one")
    remote.put_if_absent("m", b"one")  # an answer that was lost is no fault
    with pytest.raises(Conflict):
        remote.put_if_absent("m", b"two")
    assert remote.read("m").data == b"one"


def test_a_stale_swap_is_refused(remote):
    first = remote.compare_and_swap("LATEST.json", b"1", None)
    with pytest.raises(Conflict):
        remote.compare_and_swap("LATEST.json", b"2", None)
    second = remote.compare_and_swap("LATEST.json", b"2", first)
    assert second != first
    with pytest.raises(Conflict):
        remote.compare_and_swap("LATEST.json", b"3", first)
    assert remote.read("LATEST.json").data == b"2"


def test_list_shows_what_is_below_a_folder(remote):
    for key in ("a/1", "a/b/2", "ab/3"):
        remote.put_if_absent(key, key.encode())
    assert sorted(found.key for found in remote.list()) == ["a/1", "a/b/2", "ab/3"]
    assert sorted((found.key, found.size_bytes) for found in remote.list("a")) == [("a/1", 3), ("a/b/2", 5)]
    remote.delete("a/1")
    remote.delete("a/1")
    assert [found.key for found in remote.list("a/")] == ["a/b/2"]


def test_what_is_not_there_is_not_found(remote, tmp_path):
    assert remote.head("no") is None
    assert list(remote.list("no")) == []
    for ask in (lambda: remote.read("no"), lambda: remote.get_to_file("no", tmp_path / "no")):
        with pytest.raises(NotFound, match="no"):
            ask()
    assert not (tmp_path / "no").exists()


def test_what_was_altered_in_the_bucket_is_refused(remote, source, tmp_path):
    remote.put_file("a", source)
    with pytest.raises(Damaged, match="SHA-256"):
        remote.get_to_file("a", tmp_path / "a", sha256="0" * 64)
    with pytest.raises(Damaged, match="9437184 bytes, but 5"):
        remote.get_to_file("a", tmp_path / "a", size_bytes=5)
    assert not (tmp_path / "a").exists()


def test_a_missing_bucket_is_told_apart(s3, gs, tmp_path, source):  # noqa: F811
    for url in ("s3://nosuchbucket/x", "gs://nosuchbucket", f"file://{tmp_path}/nowhere"):
        remote = open_remote(url)
        with pytest.raises(BucketMissing, match="There is no"):
            list(remote.list())
    for url in ("s3://nosuchbucket", "gs://nosuchbucket"):
        remote = open_remote(url)
        asks = (lambda: remote.put_file("k", source), lambda: remote.head("k"), lambda: remote.put_if_absent("k", b""))  # noqa: B023
        for ask in asks:
            with pytest.raises(BucketMissing, match=url):
                ask()


class Stopped(Exception):
    pass


def interrupt(remote, source, *, after_bytes):
    """Break an upload off; gives its sessions."""
    sessions, sent = [], []

    def on_bytes(num_bytes):
        sent.append(num_bytes)
        if sum(sent) > after_bytes:
            raise Stopped

    with pytest.raises(Stopped):
        remote.put_file("a", source, Transfer(on_bytes=on_bytes, on_session=sessions.append))
    return sessions


def test_a_later_process_goes_on_with_an_upload_to_google(resumable_gs, tmp_path):  # noqa: F811
    source = tmp_path / "large"
    source.write_bytes(LARGE * 2)
    remote = open_remote(f"gs://bucket/{tmp_path.name}")
    (session,) = interrupt(remote, source, after_bytes=9 << 20)
    assert not remote.exists("a")
    sent = []
    remote.put_file("a", source, Transfer(on_bytes=sent.append, session=session))
    assert sum(sent) == len(LARGE) * 2 - (8 << 20)
    assert remote.get_to_file("a", tmp_path / "got").read_bytes() == LARGE * 2


def test_a_session_that_is_over_begins_anew(resumable_gs, source, tmp_path):  # noqa: F811
    remote = open_remote(f"gs://bucket/{tmp_path.name}")
    over = f"{resumable_gs}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id=gone"
    sessions = []
    remote.put_file("a", source, Transfer(session=over, on_session=sessions.append))
    assert sessions[0] is None
    assert remote.read("a").data == LARGE


def test_another_file_than_the_session_began_with_is_found_by_its_checksum(resumable_gs, source, tmp_path):  # noqa: F811
    remote = open_remote(f"gs://bucket/{tmp_path.name}")
    source.write_bytes(LARGE * 2)
    (session,) = interrupt(remote, source, after_bytes=9 << 20)
    source.write_bytes(bytes(len(LARGE)) * 2)
    with pytest.raises(Unreachable, match="arrived altered"):
        remote.put_file("a", source, Transfer(session=session))
    assert not remote.exists("a")
    remote.put_file("a", source)
    assert remote.read("a").data == source.read_bytes()


def test_azure_tells_a_missing_container_from_wrong_keys(az, source, monkeypatch):  # noqa: F811
    remote = open_remote("az://nosuchbucket")
    for ask in (lambda: remote.put_file("k", source), lambda: remote.head("k"), lambda: list(remote.list())):
        with pytest.raises(BucketMissing, match="az://nosuchbucket"):
            ask()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    with pytest.raises(CredentialsRefused, match="AZURE_STORAGE_ACCOUNT_KEY"):
        open_remote("az://bucket").put_if_absent("k", b"")


def test_nobody_at_the_address_is_worth_another_try(s3, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unreachable, match="Check the network"):
        open_remote("s3://bucket", timeout_seconds=1).head("k")


def test_a_profile_of_the_aws_command_line_is_used(s3, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "credentials").write_text("[other]\naws_access_key_id = k\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert open_remote("s3://bucket").head("no") is None
    (tmp_path / "credentials").write_text("no section\n")
    with pytest.raises(CredentialsRefused, match="cannot be read"):
        open_remote("s3://bucket")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("gs://b/x/y/", "gs://b/x/y"),
        ("gcs://b", "gs://b"),
        ("s3a://b/x", "s3://b/x"),
        ("hf://owner/repo/x", "hf://owner/repo/x"),
        ("hf://datasets/owner/repo", "hf://datasets/owner/repo"),
        ("file:///a/../b", "file:///b"),
        ("az://container/x%20y", "az://container/x y"),
    ],
)
def test_addresses_are_read(url, shown):
    assert str(parse_url(url)) == shown


@pytest.mark.parametrize(
    "url",
    ["bucket/x", "ftp://b/x", "s3://", "s3:///x", "file://host/x", "hf://owner", "s3://user:pw@b/x", "gs://b/x?y"],
)
def test_other_addresses_are_refused(url):
    with pytest.raises(UsageError) as caught:
        parse_url(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a\\b", "a\0b", "a\n", "x" * 1000])
def test_keys_that_could_lead_elsewhere_are_refused(key, tmp_path):
    with pytest.raises(NameRefused):
        path_below(tmp_path, key)


@given(st.text(max_size=30))
def test_a_key_that_passes_stays_below_its_folder(key):
    try:
        check_key(key)
    except NameRefused:
        return
    root = "/some/where"
    assert os.path.normpath(f"{root}/{key}").startswith(root + "/")


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "nightschool.remotes.google", raising=False)
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(UsageError, match=r"pip install 'nightschool\[gcs\]'"):
        open_remote("gs://bucket")


def test_a_throttle_keeps_to_its_rate():
    clock = [0.0]
    throttle = Throttle(1000, clock=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    for _ in range(100):
        throttle.wait_for(100)
    assert 9.7 <= clock[0] <= 10.1
    assert throttle.piece_bytes(1 << 20) == 4096
