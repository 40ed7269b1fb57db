"""The cache of fetched files: verified, shared, bounded, and never dropped while in use."""

import hashlib
import subprocess
import sys
import threading
import time

import pytest

from nightschool.errors import Conflict, Damaged, NotFound, Unreachable
from nightschool.remotes import open_remote
from nightschool.remotes.cache import FileCache
from nightschool.remotes.local import LocalStore
from nightschool.remotes.remote import Remote


@pytest.fixture
def remote(tmp_path):
    remote = open_remote(f"file://{tmp_path}/bucket")
    for index in range(6):
        remote.put_if_absent(f"shards/{index}.npz", bytes([index]) * 100)
    return remote


@pytest.fixture
def cache(tmp_path):
    cache = FileCache(tmp_path / "cache", limit_bytes=350)
    yield cache
    cache.close()


@pytest.fixture
def fetched(monkeypatch):
    """The keys that were read from the store."""
    keys = []
    original = LocalStore.stream

    def stream(self, key, start, etag):
        keys.append(key)
        return original(self, key, start, etag)

    monkeypatch.setattr(LocalStore, "stream", stream)
    return keys


def key(index):
    return f"shards/{index}.npz"


def wait_until(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_is_fetched_once_and_again_when_it_changed(remote, cache, fetched):
    path = cache.fetch(remote, key(1))
    assert path.read_bytes() == b"\1" * 100
    assert cache.fetch(remote, key(1)) == path
    assert fetched == [key(1)]
    remote.delete(key(1))
    remote.put_if_absent(key(1), b"new")
    assert cache.fetch(remote, key(1)).read_bytes() == b"new"


def test_a_file_that_was_verified_needs_no_store(remote, cache, monkeypatch):
    digest = hashlib.sha256(b"\2" * 100).hexdigest()
    with pytest.raises(Damaged):
        cache.fetch(remote, key(2), "0" * 64)
    path = cache.fetch(remote, key(2), digest)

    def gone(*_):
        raise Unreachable("no network")

    monkeypatch.setattr(LocalStore, "head", gone)
    assert cache.fetch(remote, key(2), digest) == path
    assert cache.fetch(remote, key(2)) == path  # better than nothing
    with pytest.raises(Unreachable):
        cache.fetch(remote, key(3))


def test_a_file_that_was_cut_on_the_disk_is_fetched_again(remote, cache):
    path = cache.fetch(remote, key(1))
    path.write_bytes(b"cut")
    assert cache.fetch(remote, key(1)).read_bytes() == b"\1" * 100


def test_what_was_used_longest_ago_is_dropped_but_not_what_is_pinned(remote, cache):
    paths = [cache.fetch(remote, key(0), pin=True)]
    for index in (1, 2):
        time.sleep(0.01)
        paths.append(cache.fetch(remote, key(index)))
    time.sleep(0.01)
    cache.fetch(remote, key(1))  # used again
    time.sleep(0.01)
    paths.append(cache.fetch(remote, key(3)))
    assert [path.exists() for path in paths] == [True, True, False, True]
    assert cache.size_bytes == 300
    cache.unpin(paths[0])
    time.sleep(0.01)
    cache.fetch(remote, key(4))
    assert not paths[0].exists()
    with pytest.raises(NotFound):
        cache.pin(paths[0])


def test_more_than_the_limit_in_use_is_refused(remote, cache):
    for index in range(3):
        cache.fetch(remote, key(index), pin=True)
    with pytest.raises(Conflict, match=r"100 B, but the cache .* may hold 350 B"):
        cache.fetch(remote, key(3))


def test_a_pin_of_another_process_counts(remote, cache, tmp_path):
    path = cache.fetch(remote, key(0))
    code = (
        "import sys, time; from pathlib import Path; from nightschool.remotes.cache import FileCache;"
        "cache = FileCache(Path(sys.argv[1]), 350); cache.pin(Path(sys.argv[2])); print('pinned', flush=True);"
        "sys.stdin.read(); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, tmp_path / "cache", path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"pinned\n"
        for index in range(1, 6):
            time.sleep(0.01)
            cache.fetch(remote, key(index))
        assert path.exists()
        other.stdin.close()
        assert other.wait() == 0
    cache.fetch(remote, key(1))
    time.sleep(0.01)
    cache.fetch(remote, key(2))
    assert not path.exists()


def test_files_are_fetched_ahead(remote, cache, fetched):
    cache.prefetch(remote, [key(0), key(1), "shards/missing.npz", key(2)])
    wait_until(lambda: cache._thread is None)
    assert cache.size_bytes == 300
    cache.fetch(remote, key(1))
    assert fetched == [key(0), key(1), key(2)]
    with pytest.raises(NotFound):
        cache.fetch(remote, "shards/missing.npz")


def test_threads_that_want_the_same_file_fetch_it_once(remote, cache, fetched):
    threads = [threading.Thread(target=cache.fetch, args=(remote, key(1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [key(1)]


def test_threads_that_write_at_once_do_not_count_on_the_same_room(remote, cache, monkeypatch):
    cache.fetch(remote, key(0), pin=True)
    cache.fetch(remote, key(1), pin=True)
    writing, go_on = threading.Event(), threading.Event()
    original = Remote.get_to_file

    def slowly(self, name, path, **more):
        if name == key(2):
            writing.set()
            assert go_on.wait(60)
        return original(self, name, path, **more)

    monkeypatch.setattr(Remote, "get_to_file", slowly)
    cache.prefetch(remote, [key(2)])
    assert writing.wait(60)
    # 200 bytes are pinned and 100 are being written: 100 more would be 50 too many.
    second = threading.Thread(target=cache.fetch, args=(remote, key(3)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert cache.size_bytes <= cache.limit_bytes
    go_on.set()
    second.join(10)
    assert cache.path_of(remote, key(3)).exists()
    assert not cache.path_of(remote, key(2)).exists()
    assert cache.size_bytes <= cache.limit_bytes
