"""One remote place: what can be done there, whatever store it is on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from nightschool.errors import Conflict, NameRefused, NotFound, Unreachable
from nightschool.remotes.address import Address
from nightschool.remotes.download import download
from nightschool.remotes.transfer import SourceFile, Transfer, source_of
from nightschool.store.names import check_key


@dataclass(frozen=True)
class ObjectInfo:
    """One object. `etag` changes with the content; what it is made of is the store's own business."""

    key: str
    size_bytes: int
    etag: str
    modified_at: datetime | None = None


class ObjectStore(Protocol):
    """What a kind of store must do. Keys are whole, and were checked. This is all of it."""

    def put_file(self, key: str, source: SourceFile, transfer: Transfer) -> str:
        """Store a file, replacing what was there, and have the server's checksum compared with what was sent.

        Nothing can be read under the key until all of it is there. Returns the etag.
        """
        ...

    def swap(self, key: str, content: bytes, etag: str | None) -> str:
        """Store a small object in place of one that still has that etag, or (None) of none. Returns the new etag.

        Raises Conflict if there is another one.
        """
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """The facts of an object, or None."""
        ...

    def stream(self, key: str, start: int, etag: str) -> Iterator[bytes]:
        """The bytes of an object from `start`. Raises NotFound, or Conflict if its etag is another by now."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects below a folder, `""` or ending in `/`, in any order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is as good as removed."""
        ...


@dataclass(frozen=True)
class Content:
    """A small object as a whole, and the etag that it had."""

    data: bytes
    etag: str


@dataclass(frozen=True)
class Remote:
    """A folder in an object store. Keys are relative to it, and checked.

    Every method raises, where it applies: CredentialsRefused, BucketMissing, Unreachable (worth trying again),
    RemoteError (anything else that the store said), NameRefused (a key that could lead elsewhere).
    """

    address: Address
    store: ObjectStore

    @property
    def url(self) -> str:
        return str(self.address)

    def url_of(self, key: str) -> str:
        """The address of one object."""
        return f"{self.url.rstrip('/')}/{key}"

    def put_file(self, key: str, path: Path, transfer: Transfer | None = None) -> str:
        """Upload a file under a key, replacing what was there; it appears whole, and is compared by checksum.

        Returns the object's etag.

        Raises:
            Damaged: If the file is not what `transfer.sha256` says, or the store holds other bytes than were sent.
        """
        transfer = transfer or Transfer()
        with source_of(path, transfer) as source:
            return self.store.put_file(self._whole(key), source, transfer)

    def put_if_absent(self, key: str, content: bytes) -> str:
        """Store a small object that nobody has stored before; the same content again is not a mistake.

        Raises:
            Conflict: If the key holds something else.
            Unreachable: If it arrived altered; then it is not there.
        """
        try:
            etag = self.store.swap(self._whole(key), content, None)
        except Conflict:
            # An answer that was lost on the way looks like this too.
            present = self.read(key)
            if present.data != content:
                raise
            return present.etag
        try:
            return self._compared(key, content, etag)
        except Unreachable:
            self.delete(key)
            raise

    def compare_and_swap(self, key: str, content: bytes, etag: str | None) -> str:
        """Replace a small object whose etag is still that one; None: which does not exist yet. Returns the new etag.

        Raises:
            Conflict: If somebody else was quicker.
            Unreachable: If it arrived altered, or nobody knows whether it arrived.
        """
        return self._compared(key, content, self.store.swap(self._whole(key), content, etag))

    def _compared(self, key: str, content: bytes, etag: str) -> str:
        """Read a small object back: not every store can say of what it made its etag."""
        present = self.read(key)
        if present.etag == etag and present.data != content:
            raise Unreachable(f"{self.url_of(key)} arrived altered. It is sent again.")
        return etag

    def read(self, key: str, *, most_bytes: int = 64 << 20) -> Content:
        """A small object as a whole.

        Raises:
            NotFound: If there is none.
            Conflict: If it is larger than `most_bytes`.
        """
        facts = self.facts(key)
        if facts.size_bytes > most_bytes:
            raise Conflict(
                f"{self.url_of(key)} has {facts.size_bytes} bytes, but at most {most_bytes} are read at once. "
                f"It is not what it should be; look at it."
            )
        return Content(b"".join(self.stream(key, 0, facts.etag)), facts.etag)

    def stream(self, key: str, start: int, etag: str) -> Iterator[bytes]:
        """The bytes of an object from `start`. Raises NotFound, or Conflict if its etag is another by now."""
        return self.store.stream(self._whole(key), start, etag)

    def get_to_file(self, key: str, path: Path, *, sha256: str | None = None, size_bytes: int | None = None) -> Path:
        """Download an object; `path` appears only when it is whole, and is what `sha256` and `size_bytes` say.

        A transfer that breaks off goes on where it was, also in a later process.

        Raises:
            NotFound: If there is no such object.
            Damaged: If what the store holds is something else.
            DiskFull: If there is no room; `path` is then untouched.
        """
        return download(self, key, path, sha256=sha256, size_bytes=size_bytes)

    def head(self, key: str) -> ObjectInfo | None:
        """The facts of an object, or None if there is none. Its key is relative."""
        found = self.store.head(self._whole(key))
        return None if found is None else ObjectInfo(key, found.size_bytes, found.etag, found.modified_at)

    def facts(self, key: str) -> ObjectInfo:
        """The facts of an object. Raises NotFound if there is none."""
        found = self.head(key)
        if found is None:
            raise NotFound(f"There is no {self.url_of(key)}. Check the address, or list what is there.")
        return found

    def exists(self, key: str) -> bool:
        return self.head(key) is not None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects below the folder `prefix`, or all, with relative keys. Names that no path can have are left out.

        Raises:
            BucketMissing: If there is no such bucket; an empty one has no objects.
        """
        base = f"{self._base}/" if self._base else ""
        folder = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        for found in self.store.list(base + folder):
            key = found.key.removeprefix(base)
            if found.key.startswith(base + folder) and _is_key(key):
                yield ObjectInfo(key, found.size_bytes, found.etag, found.modified_at)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is as good as removed."""
        self.store.delete(self._whole(key))

    @property
    def _base(self) -> str:
        return "" if self.address.scheme == "file" else self.address.prefix

    def _whole(self, key: str) -> str:
        check_key(key)
        return f"{self._base}/{key}" if self._base else key


def _is_key(key: str) -> bool:
    # What ends in a slash is how some consoles draw folders: an empty object.
    try:
        check_key(key)
    except NameRefused:
        return False
    return True
