"""Connections to a memory's file: one to read, one to write, for all threads of a process.

SQLite with a write-ahead log and `synchronous=FULL`: a write that was acknowledged survives SIGKILL and a power cut, one that
was not is not there at all, and readers never wait for a writer. What is deleted is overwritten (`secure_delete`).
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from nightschool.errors import Conflict, Damaged, DiskFull, Locked, MadeByNewer, NotFound
from nightschool.memory.store.addresses import address_of
from nightschool.memory.store.layout import APPLICATION_ID, FORMAT, FROM_1

FILE_NAME = "memory.db"
_BUSY_SECONDS = 30.0
_CACHE_KIB = 64 * 1024


class Connections:
    """The two connections of a process to one file. Each is used by one thread at a time; they do not wait for each other."""

    def __init__(self, file: Path, *, busy_seconds: float = _BUSY_SECONDS) -> None:
        self.file = file
        self._busy_seconds = busy_seconds
        self._read_guard, self._write_guard = threading.RLock(), threading.RLock()
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._reader_inode: int | None = None
        self._writer_inode: int | None = None

    @property
    def mode(self) -> str:
        """How the file is opened: to write, or as it is where that is not allowed."""
        return _mode(self.file, is_ours=_is_ours(self.file))

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection to read, for a few queries. Each of them sees the newest commit; a revision pins what they show."""
        with self._read_guard, self._translated():
            self._reader = self._still_of(self._reader, self._reader_inode)
            if self._reader is None:
                self._reader_inode = _inode_of(self.file)
                self._reader = self._opened()
            yield self._reader

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of the block is stored, durably, when it ends, or nothing. Takes the write lock at once."""
        with self.alone() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def alone(self) -> Iterator[sqlite3.Connection]:
        """The connection to write, outside of a transaction."""
        with self._write_guard, self._translated():
            self._writer = self._still_of(self._writer, self._writer_inode)
            if self._writer is None:
                self._writer_inode = _inode_of(self.file)
                self._refuse_read_only()
                self._writer = self._opened()
            yield self._writer

    def _still_of(self, connection: sqlite3.Connection | None, inode: int | None) -> sqlite3.Connection | None:
        """The connection, unless its file was deleted or replaced by another memory of the same name."""
        if connection is not None and inode != _inode_of(self.file):
            connection.close()
            return None
        return connection

    def close(self) -> None:
        """Give both back; the next use opens new ones."""
        with self._read_guard, self._write_guard:
            for connection in (self._reader, self._writer):
                if connection is not None:
                    connection.close()
            self._reader = self._writer = None

    def _opened(self) -> sqlite3.Connection:
        if not self.file.is_file():
            raise NotFound(_not_there(self.file))
        connection = connect(self.file, self.mode, busy_seconds=self._busy_seconds)
        try:
            if _is_ours(self.file):
                _prepare(connection, self._busy_seconds)
                _convert(connection)
            _check_format(connection, self.file)
        except BaseException:
            connection.close()
            raise
        return connection

    def _refuse_read_only(self) -> None:
        if self.file.is_file() and not _is_ours(self.file):
            raise Conflict(
                f"{self.file} cannot be written: it is read-only, or belongs to another user. Make it writable, or copy "
                f"the home and name the copy in NIGHTSCHOOL_HOME."
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise translated(error, self.file, self._busy_seconds) from error


def _inode_of(file: Path) -> int | None:
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return None


def connect(file: Path, mode: str = "mode=rwc", *, busy_seconds: float = _BUSY_SECONDS) -> sqlite3.Connection:
    """A bare connection. Transactions begin and end where we say so."""
    where = f"file:{quote(str(file.absolute()))}?{mode}"
    found = sqlite3.connect(where, uri=True, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
    found.create_function("address_of", 3, address_of, deterministic=True)
    return found


def create(file: Path, script: str, busy_seconds: float = _BUSY_SECONDS) -> None:
    """Make the file with its tables, all at once.

    Raises:
        Conflict: If there are tables already.
    """
    connection = connect(file, busy_seconds=busy_seconds)
    try:
        _prepare(connection, busy_seconds)
        connection.execute("BEGIN IMMEDIATE")
        if _number(connection, "SELECT count(*) FROM sqlite_master"):
            raise Conflict(f"There is a memory in {file.parent} already. Add to it, or choose another name.")
        for statement in script.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise translated(error, file, busy_seconds) from error
    finally:
        connection.close()


def translated(error: sqlite3.Error | UnicodeDecodeError, file: Path, busy_seconds: float = _BUSY_SECONDS) -> Exception:
    """What SQLite said, as an error of ours where it is one. Of damage it says whatever it stumbled over."""
    said = str(error)
    if "is full" in said or "No space left" in said:
        return DiskFull(
            f"There is no room for {file} ({said}); what was stored before is still whole. Free some space and try again."
        )
    if "is locked" in said or "is busy" in said:
        return Locked(
            f"Another process has been writing {file} for more than {busy_seconds:.0f} s, and nothing was changed. "
            f"Wait until it is done, or stop that process."
        )
    if "readonly" in said or "unable to open" in said:
        return Conflict(
            f"{file} cannot be written ({said}): it is read-only, or belongs to another user. Make it writable, or copy "
            f"the home and name the copy in NIGHTSCHOOL_HOME."
        )
    # A syntax error alone would be a mistake of ours.
    if not said.startswith("near ") and type(error) in (
        sqlite3.OperationalError,
        sqlite3.DatabaseError,
        UnicodeDecodeError,
    ):
        return Damaged(
            f"The memory {file} is damaged ({said}). nightschool memory check says what of it is whole; restore it from a "
            f"copy, or build it anew from its sources."
        )
    return error


def _is_ours(file: Path) -> bool:
    return os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)


def _mode(file: Path, *, is_ours: bool) -> str:
    if is_ours:
        return "mode=rw"
    # Without a log beside the file nobody writes: only `immutable` then keeps SQLite from making one.
    return "mode=ro" if Path(f"{file}-wal").exists() else "mode=ro&immutable=1"


def _prepare(connection: sqlite3.Connection, busy_seconds: float) -> None:
    deadline = time.monotonic() + busy_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            # Of two connections that switch at once SQLite refuses one without waiting, lest each waits for the other.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")


def _convert(connection: sqlite3.Connection) -> None:
    """Bring a file of an older form to this one, all at once."""
    if (
        _number(connection, "PRAGMA application_id") != APPLICATION_ID
        or _number(connection, "PRAGMA user_version") != 1
    ):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have done it meanwhile.
        if _number(connection, "PRAGMA user_version") == 1:
            for statement in FROM_1.split(";"):
                connection.execute(statement)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _check_format(connection: sqlite3.Connection, file: Path) -> None:
    # As one state of the file has them: somebody may be making it, or bringing it to another form, at this moment.
    connection.execute("BEGIN")
    try:
        found = _number(connection, "PRAGMA user_version")
        application_id = _number(connection, "PRAGMA application_id")
        num_tables = _number(connection, "SELECT count(*) FROM sqlite_master")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    if found > FORMAT:
        raise MadeByNewer(
            f"{file} was written by a newer nightschool (form {found}); this one knows {FORMAT}. "
            f"Install the newer nightschool again."
        )
    if not found and not num_tables:
        raise NotFound(_not_there(file))
    if application_id != APPLICATION_ID:
        raise Damaged(
            f"{file} is a SQLite file, but no memory of nightschool. Move it away, and build the memory anew."
        )
    if found < FORMAT:
        raise Conflict(
            f"{file} was written by an older nightschool (form {found}), and cannot be brought to form {FORMAT} here: it is "
            f"read-only, or belongs to another user. Make it writable, or copy the home and name the copy in NIGHTSCHOOL_HOME."
        )


def _number(connection: sqlite3.Connection, query: str) -> int:
    return int(connection.execute(query).fetchone()[0])


def _not_there(file: Path) -> str:
    return (
        f"There is no memory {file.parent.name!r} ({file.parent} holds none). "
        f"nightschool memory ls shows those that are there; nightschool memory build {file.parent.name} --from FILE makes it."
    )
