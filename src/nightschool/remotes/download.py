"""Downloads that go on where they broke off, and appear under their name only when they are whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nightschool.errors import Conflict, Damaged, Locked, Unreachable
from nightschool.store.atomic import PARTIAL, make_folder, room_needed, sync_folder, write_all

if TYPE_CHECKING:
    from nightschool.remotes.remote import ObjectInfo, Remote

_TRIES = 6
_TRIES_WHEN_WRONG = 3
_WAIT_SECONDS = 600.0


def download(remote: Remote, key: str, path: Path, *, sha256: str | None, size_bytes: int | None) -> Path:
    """See `Remote.get_to_file`."""
    url = remote.url_of(key)
    make_folder(path.parent)
    with room_needed(path):
        tries = 0
        while True:
            present = remote.facts(key)
            if size_bytes is not None and present.size_bytes != size_bytes:
                raise Damaged(
                    f"{url} has {present.size_bytes} bytes, but {size_bytes} belong there. "
                    f"It was cut or replaced in the bucket; take another copy."
                )
            # The etag is in the name: the rest of other content is never appended.
            mark = hashlib.sha256(f"{url}\n{present.etag}\n{sha256}".encode()).hexdigest()[:16]
            rest = path.with_name(f".{path.name[:100]}-{mark}{PARTIAL}")
            before = _size_of(rest)
            try:
                _fetch(remote, present, rest, path, sha256)
            except (Unreachable, Conflict, Damaged) as error:
                # What gets on is tried for as long as it does.
                tries = 1 if _size_of(rest) > before else tries + 1
                # Bytes that are wrong may have been altered on the way: twice more, and it is the bucket.
                most = _TRIES_WHEN_WRONG if isinstance(error, Damaged) else _TRIES
                if tries >= most or isinstance(error, Locked):
                    raise
                time.sleep(random.uniform(0.1, 0.2 * 2**tries))
            else:
                return path


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _fetch(remote: Remote, present: ObjectInfo, rest: Path, path: Path, sha256: str | None) -> None:
    url = remote.url_of(present.key)
    handle = _claim(rest)
    try:
        digest = hashlib.sha256()
        position = _hash_what_is_there(handle, digest)
        if position > present.size_bytes:
            _start_over(handle)
            digest, position = hashlib.sha256(), 0
        for chunk in remote.stream(present.key, position, present.etag) if position < present.size_bytes else ():
            digest.update(chunk)
            position += len(chunk)
            write_all(handle, chunk)
        if position != present.size_bytes:
            raise Unreachable(
                f"The transfer of {url} ended after {position} of {present.size_bytes} bytes. Try again later."
            )
        if sha256 is not None and digest.hexdigest() != sha256:
            _start_over(handle)
            raise Damaged(
                f"{url} has the SHA-256 {digest.hexdigest()}, but {sha256} belongs there. "
                f"It was altered on the way or in the bucket; try again, or take another copy."
            )
        os.fsync(handle)
        rest.replace(path)
        sync_folder(path.parent)
    finally:
        os.close(handle)


def _claim(rest: Path) -> int:
    """Open and lock what is fetched, or what an earlier process has of it."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        handle = os.open(rest, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.lstat(rest)):
                return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise Locked(f"Another process is fetching {rest}. Wait until it is done, or stop it.") from None
            time.sleep(0.05)
        except FileNotFoundError:  # it became the file itself, or was swept
            pass
        os.close(handle)


def _hash_what_is_there(handle: int, digest: hashlib._Hash) -> int:
    position = 0
    while chunk := os.pread(handle, 4 << 20, position):
        digest.update(chunk)
        position += len(chunk)
    os.lseek(handle, position, os.SEEK_SET)
    return position


def _start_over(handle: int) -> None:
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
