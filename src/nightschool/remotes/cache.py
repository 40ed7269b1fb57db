"""Files of object stores, kept on disk: fetched ahead, verified, shared by processes, and dropped when room is needed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nightschool.errors import Conflict, Damaged, NightschoolError, NotFound, Unreachable
from nightschool.remotes.remote import Remote
from nightschool.store.atomic import PARTIAL, make_folder, read_json, write_bytes, write_json
from nightschool.store.locks import lock
from nightschool.store.names import path_below
from nightschool.units import format_bytes

_WAIT_SECONDS = 3600.0
_FACTS = ".facts"


class FileCache:
    """Files below `folder`, together at most `limit_bytes`; the one that was used longest ago goes first.

    A file that is pinned, by any process, is never dropped. Several processes may share a folder: each file is fetched
    once. Threads of a process may share the object.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self.limit_bytes = limit_bytes
        self._guard = threading.Condition()
        self._pins: dict[Path, tuple[int, int]] = {}
        self._reserved: dict[Path, int] = {}
        self._wanted: deque[tuple[Remote, str, str | None]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        make_folder(folder)

    def fetch(self, remote: Remote, key: str, sha256: str | None = None, *, pin: bool = False) -> Path:
        """The file of an object, from the disk if it is there and still what the store has.

        With `sha256` a file that was verified once needs no question to the store. Without it the store is asked for
        the etag; when it cannot be reached, what is there is used.

        Args:
            remote: Where the object lies.
            key: Its key.
            sha256: What its bytes must have.
            pin: Keep it until `unpin`.

        Raises:
            NotFound: If there is no such object.
            Damaged: If the object is not what `sha256` says.
            Conflict: If it does not fit the limit beside what is pinned.
            DiskFull: If the disk has no room.
        """
        path = self.path_of(remote, key)
        make_folder(path.parent)
        with lock(_beside(path, ".lock"), f"{path}", wait_seconds=_WAIT_SECONDS):
            if not self._is_fresh(remote, key, path, sha256):
                present = remote.head(key)
                if present is None:
                    raise NotFound(f"There is no {remote.url_of(key)}. Check the address, or list what is there.")
                with self._room_for(present.size_bytes, path, remote.url_of(key)):
                    remote.get_to_file(key, path, sha256=sha256, size_bytes=present.size_bytes)
                write_json(
                    _beside(path, _FACTS), {"etag": present.etag, "sha256": sha256, "size_bytes": present.size_bytes}
                )
            os.utime(path)
            if pin:
                self.pin(path)
        return path

    def prefetch(self, remote: Remote, keys: Iterable[str], sha256: dict[str, str] | None = None) -> None:
        """Fetch these, in this order, in a thread. What does not fit is left; a fault is told by `fetch`."""
        with self._guard:
            self._wanted = deque((remote, key, (sha256 or {}).get(key)) for key in keys)
            if self._thread is None and self._wanted and not self._closed:
                self._thread = threading.Thread(target=self._fetch_ahead, name="prefetch", daemon=True)
                self._thread.start()

    @property
    def folder_of_made(self) -> Path:
        """Where files that were made of fetched ones lie. Whatever is there counts and goes like those."""
        return self._folder / "made"

    def keep(self, path: Path, content: bytes) -> None:
        """Write a file in `folder_of_made`. A program that has mapped it when it is dropped still reads it.

        Raises:
            Conflict: If it does not fit the limit beside what is pinned.
            DiskFull: If the disk has no room.
        """
        with self._room_for(len(content), path, "The plain copy of a fetched file"):
            write_bytes(path, content)

    def pin(self, path: Path) -> None:
        """Let nobody drop a file that `fetch` gave, until `unpin` was called as often.

        Raises:
            NotFound: If it was dropped meanwhile; fetch it with `pin=True`.
        """
        with self._guard:
            handle, count = self._pins.get(path, (-1, 0))
            if not count:
                try:
                    handle = os.open(path, os.O_RDONLY)
                except FileNotFoundError:
                    raise NotFound(f"{path} is not in the cache any more. Fetch it again, and pin it then.") from None
                fcntl.flock(handle, fcntl.LOCK_SH)
            self._pins[path] = handle, count + 1

    def unpin(self, path: Path) -> None:
        """Allow a file to be dropped again."""
        with self._guard:
            handle, count = self._pins.pop(path)
            if count > 1:
                self._pins[path] = handle, count - 1
            else:
                os.close(handle)

    def close(self) -> None:
        """End the thread after the file it is at, and drop all pins."""
        with self._guard:
            self._closed = True
            self._wanted.clear()
            thread = self._thread
        if thread is not None:
            thread.join()
        for path in list(self._pins):
            handle, _ = self._pins.pop(path)
            os.close(handle)

    def path_of(self, remote: Remote, key: str) -> Path:
        """Where the file of an object is, or would be.

        Raises:
            NameRefused: If the key could lead elsewhere.
        """
        place = hashlib.sha256(remote.url.encode()).hexdigest()[:16]
        return path_below(self._folder / place, key)

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(size for _, size, _ in self._files())

    def _is_fresh(self, remote: Remote, key: str, path: Path, sha256: str | None) -> bool:
        try:
            kept = read_json(_beside(path, _FACTS))
            size_bytes = path.stat().st_size
        except (NotFound, Damaged, FileNotFoundError):
            return False
        if size_bytes != kept.get("size_bytes"):
            return False
        if sha256 is not None:
            return bool(kept.get("sha256") == sha256)
        try:
            present = remote.head(key)
        except Unreachable:
            return True
        return present is not None and present.etag == kept.get("etag")

    @contextmanager
    def _room_for(self, size_bytes: int, path: Path, what: str) -> Iterator[None]:
        """Make room for a file and reserve it until the block, which writes the file, ends.

        Without the reservation two threads that write at once would both count on the same room.

        Raises:
            Conflict: If too much is pinned.
        """
        while True:
            try:
                self._make_room(size_bytes, path, what)
                break
            except Conflict:
                # What another thread is writing can be dropped once it is there.
                with self._guard:
                    if not self._reserved:
                        raise
                    self._guard.wait()
        try:
            yield
        finally:
            with self._guard:
                del self._reserved[path]
                self._guard.notify_all()

    def _make_room(self, size_bytes: int, path: Path, what: str) -> None:
        """Drop the files used longest ago until the wanted one fits; reserve its bytes.

        Raises:
            Conflict: If too much is pinned.
        """
        with lock(self._folder / ".lock", f"the cache {self._folder}", wait_seconds=_WAIT_SECONDS):
            with self._guard:
                reserved = dict(self._reserved)
            files = [file for file in self._files() if file[2] != path and file[2] not in reserved]
            over = sum(size for _, size, _ in files) + sum(reserved.values()) + size_bytes - self.limit_bytes
            for _, size, old in sorted(files):
                if over > 0 and _drop(old):
                    over -= size
            if over <= 0:
                with self._guard:
                    self._reserved[path] = size_bytes
        if over > 0:
            raise Conflict(
                f"{what} has {format_bytes(size_bytes)}, but the cache {self._folder} may "
                f"hold {format_bytes(self.limit_bytes)}, and the rest is in use. Allow it more."
            )

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each file was used last, its size, and the file."""
        files = []
        for parent, _, names in os.walk(self._folder):
            for name in names:
                if not name.startswith(".") and not name.endswith(PARTIAL):
                    path = Path(parent) / name
                    try:
                        found = path.stat()
                    except FileNotFoundError:
                        continue
                    files.append((found.st_mtime, found.st_size, path))
        return files

    def _fetch_ahead(self) -> None:
        while True:
            with self._guard:
                if not self._wanted:
                    self._thread = None
                    return
                remote, key, sha256 = self._wanted.popleft()
            try:
                self.fetch(remote, key, sha256)
            except (NotFound, Damaged):
                continue  # whoever needs this very file asks for it by `fetch`, and is told there
            except (NightschoolError, OSError):
                with self._guard:
                    self._wanted.clear()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _drop(path: Path) -> bool:
    """Remove a file that nobody has pinned."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _beside(path, _FACTS).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
