"""A folder as an object store: another disk, or a file system of the network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from nightschool.errors import BucketMissing, Conflict, CredentialsRefused, NotFound
from nightschool.remotes.address import Address
from nightschool.remotes.remote import ObjectInfo
from nightschool.remotes.transfer import SourceFile, Transfer
from nightschool.store.atomic import PARTIAL, replacing, write_all, write_bytes
from nightschool.store.locks import lock
from nightschool.store.names import path_below

_CHUNK_BYTES = 1 << 20
_LOCK = ".nightschool.lock"
_WAIT_SECONDS = 30.0


class LocalStore:
    """Objects are files below `root`. Each appears whole, and stays when the power fails."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put_file(self, key: str, source: SourceFile, transfer: Transfer) -> str:  # noqa: ARG002
        """Copy a file; there is no server that could disagree."""
        target = path_below(self._root, key)
        with self._translated(), replacing(target) as handle:
            for chunk in source.pieces(_CHUNK_BYTES):
                write_all(handle, chunk)
        return _etag(target.stat())

    def swap(self, key: str, content: bytes, etag: str | None) -> str:
        """Under a lock, because a file system cannot compare and rename at once."""
        target = path_below(self._root, key)
        with self._translated(), lock(self._root / _LOCK, f"the pointers in {self._root}", wait_seconds=_WAIT_SECONDS):
            present = self.head(key)
            if (present.etag if present else None) != etag:
                raise Conflict(f"{target} exists already, or was changed meanwhile. Read it, and compare.")
            write_bytes(target, content)
            return _etag(target.stat())

    def head(self, key: str) -> ObjectInfo | None:
        path = path_below(self._root, key)
        with self._translated():
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            if not path.is_file():
                return None
        return ObjectInfo(key, found.st_size, _etag(found), datetime.fromtimestamp(found.st_mtime, UTC))

    def stream(self, key: str, start: int, etag: str) -> Iterator[bytes]:
        path = path_below(self._root, key)
        with self._translated():
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:
                raise NotFound(f"There is no {path}. Check the address, or list what is there.") from None
            with file:
                if _etag(os.fstat(file.fileno())) != etag:
                    raise Conflict(f"{path} was changed while it was read. Try again.")
                file.seek(start)
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if not self._root.is_dir():
            raise BucketMissing(f"There is no folder {self._root}. Check the address, or create it.")
        top = path_below(self._root, prefix.strip("/")) if prefix.strip("/") else self._root
        with self._translated():
            for parent, folders, files in os.walk(top):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in sorted(files):
                    path = Path(parent) / name
                    if not name.startswith(".") and not name.endswith(PARTIAL) and not path.is_symlink():
                        found = self.head(path.relative_to(self._root).as_posix())
                        if found is not None:
                            yield found

    def delete(self, key: str) -> None:
        with self._translated():
            path_below(self._root, key).unlink(missing_ok=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise CredentialsRefused(
                f"{error.filename or self._root} may not be used: {error.strerror}. Change the rights of the folder."
            ) from error


def _etag(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def open_folder(address: Address, *, timeout_seconds: float) -> LocalStore:  # noqa: ARG001
    """The folder of a `file://` address; created when something is stored."""
    return LocalStore(Path(address.prefix))
