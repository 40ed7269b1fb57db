"""The state database of a home, at the newest layout.

SQLite in the home (write-ahead log, so that readers never wait for a writer), or PostgreSQL when DATABASE_URL names
one; there every home has a schema of its own, so that two homes on one database do not meet. The layout is brought up
to date by the migrations in this package at the first connection, under a lock; one that is up to date costs one query.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool, StaticPool

from nightschool.errors import Conflict, Damaged, DiskFull, Locked, UsageError
from nightschool.store.atomic import make_folder
from nightschool.store.home import Home
from nightschool.store.home_file import check_format, id_of
from nightschool.store.locks import lock
from nightschool.store.tables import metadata

URL_VARIABLE = "DATABASE_URL"
# The newest migration in migrations/versions; a test compares the two.
HEAD = "0012"
_BUSY_SECONDS = 30.0
_CLEAR_WAIT_SECONDS = 1
_MIGRATION_WAIT_SECONDS = 120.0
# Any number will do, if only every nightschool takes the same one.
_POSTGRES_MIGRATION_LOCK = 6_178_236_450


class Database:
    """The state database of a home: connected at first need, kept for all threads of a process, closed with it.

    A home hands out its own: `home.database`. Reading creates nothing: a home without a database reads as one in which
    nothing is kept, and one that cannot be written, as on a read-only mount, is read as it is. Writing creates the
    database, and both bring its layout up to date.

    Every use raises:
        UsageError: If DATABASE_URL is no SQLite or PostgreSQL address, or its driver is not installed.
        Conflict: If a newer nightschool wrote the database, other homes share its tables, or it cannot be written.
        MadeByNewer: If a newer nightschool has given the home another form.
        Locked: If another writer keeps the database for more than 30 s.
        DiskFull: If there is no room.
        Damaged: If the file is not a database, or was altered.
    """

    def __init__(self, home: Home, *, env: Mapping[str, str] | None = None) -> None:
        self._home = home
        self._env = os.environ if env is None else env
        self._guard = threading.Lock()
        self._engine: Engine | None = None

    @property
    def home(self) -> Home:
        """Whose state it is."""
        return self._home

    @property
    def engine(self) -> Engine:
        """The connections for writing."""
        with self._guard:
            if self._engine is None:
                self._engine = _connected(self._home, _database_url(self._home, self._env))
                weakref.finalize(self, self._engine.dispose)
            return self._engine

    def connect(self) -> Database:
        """Connect to write now, for whoever wants to fail before the work begins. Returns itself."""
        self.engine.connect().close()
        return self

    def read(self) -> AbstractContextManager[Connection]:
        """A connection whose queries all see one moment."""
        return _reading(self._engine_to_read())

    @contextmanager
    def write(self, *, alone_in: sa.Table | None = None, durable: bool = True) -> Iterator[Connection]:
        """A transaction: all of the block is stored, or nothing.

        What is not `durable` outlives this process as well, but a power cut may undo it: for what can be found out again
        afterwards. It saves the wait for the disk (measured: 10 ms of 12).

        On SQLite it takes the write lock at once, so that what is read in the block is still true when it writes.
        On PostgreSQL that holds for the rows of `alone_in`, which nobody else writes meanwhile.
        """
        with _writing(self.engine, durable=durable) as connection:
            is_postgres = connection.dialect.name != "sqlite"
            if is_postgres and not durable:
                connection.execute(sa.text("SET LOCAL synchronous_commit TO OFF"))
            if is_postgres and alone_in is not None:
                connection.execute(sa.text(f'LOCK TABLE "{alone_in.name}" IN SHARE ROW EXCLUSIVE MODE'))
            yield connection

    def _engine_to_read(self) -> Engine:
        if self._engine is not None:
            return self._engine
        url = _database_url(self._home, self._env)
        is_new = check_format(self._home) is None and not _is_used(self._home)
        file = Path(url.database or "") if url.get_backend_name() == "sqlite" else None
        if is_new if file is None else not (file.is_file() and file.stat().st_size):
            return _empty_engine()
        if file is not None and not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
            return _as_it_is(file, url)
        return self.engine

    def clear_log(self) -> None:
        """Fold SQLite's write-ahead log into the database file, so that what was deleted is not read from the log.

        Where another connection reads for more than a second, SQLite does it later by itself.
        """
        if self.engine.dialect.name == "sqlite":
            # A pragma of this kind runs outside of transactions, which `connect` would begin.
            connection = self.engine.raw_connection()
            try:
                cursor = connection.cursor()
                cursor.execute(f"PRAGMA busy_timeout = {_CLEAR_WAIT_SECONDS * 1000}")
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                cursor.execute(f"PRAGMA busy_timeout = {int(_BUSY_SECONDS * 1000)}")
            finally:
                connection.close()

    def close(self) -> None:
        """Give back all connections; the next use makes new ones."""
        with self._guard:
            if self._engine is not None:
                self._engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _reading(engine: Engine) -> Iterator[Connection]:
    with _translated(engine), engine.connect() as connection:
        yield connection


@contextmanager
def _writing(engine: Engine, *, durable: bool = True) -> Iterator[Connection]:
    options = {"writes": True, "durable": durable}
    with _translated(engine), engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


@contextmanager
def _translated(engine: Engine) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        where = engine.url.render_as_string(hide_password=True)
        said = str(error.orig)
        if "is full" in said or "No space left" in said:
            raise DiskFull(
                f"There is no room for the database {where} ({said}); what was stored before is still whole. "
                f"Free some space and try again."
            ) from error
        if "is locked" in said:
            raise Locked(
                f"Another process has been writing the database {where} for more than {_BUSY_SECONDS:.0f} s. "
                f"Wait until it is done, or stop that process."
            ) from error
        if "readonly" in said or "unable to open" in said:
            raise Conflict(
                f"The database {where} cannot be written ({said}): the home is read-only, or belongs to another user. "
                f"Make it writable, or copy it and name the copy in NIGHTSCHOOL_HOME."
            ) from error
        if "malformed" in said or "not a database" in said:
            raise Damaged(
                f"The database {where} is damaged ({said}). Restore it from a copy, or move it away."
            ) from error
        raise


def _connected(home: Home, url: URL) -> Engine:
    """The engine of a database that exists, at the newest layout."""
    check_format(home)
    if url.get_backend_name() == "sqlite" and Path(url.database or "") == home.state_db:
        make_folder(home.path)
    engine = _create_engine(url, home)
    try:
        if _revision(engine) != HEAD:
            _migrate(home, engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@cache
def _empty_engine() -> Engine:
    engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    metadata.create_all(engine)
    return engine


def _as_it_is(file: Path, url: URL) -> Engine:
    """A SQLite file that cannot be written.

    Beside a write-ahead log SQLite reads both, and whoever writes them elsewhere is seen. Without one nobody writes:
    only `immutable` then keeps SQLite from making a log.
    """
    mode = "mode=ro" if Path(f"{file}-wal").exists() else "mode=ro&immutable=1"

    def connect() -> sqlite3.Connection:
        where = f"file:{quote(str(file.absolute()))}?{mode}"
        return sqlite3.connect(where, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)

    # Not kept: whether there is a log is asked each time.
    engine = sa.create_engine(url, creator=connect, poolclass=NullPool)
    sa.event.listen(engine, "begin", _begin_sqlite)
    revision = _revision(engine)
    if revision != HEAD:
        raise Conflict(
            f"{file} has the layout {revision}, this nightschool reads {HEAD}, and the file cannot be written to "
            f"bring it up to date. Make it writable, or copy the home and name the copy in NIGHTSCHOOL_HOME."
        )
    return engine


def _database_url(home: Home, env: Mapping[str, str]) -> URL:
    value = env.get(URL_VARIABLE, "")
    if not value:
        return URL.create("sqlite", database=str(home.state_db))
    try:
        # `postgres://` is what many platforms set; SQLAlchemy knows only the full word.
        url = make_url("postgresql" + value.removeprefix("postgres") if value.startswith("postgres:") else value)
    except ArgumentError:
        raise UsageError(
            f"{URL_VARIABLE} is not a database address. Write postgresql://user:password@host/database."
        ) from None
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise UsageError(
            f"{URL_VARIABLE} names the database kind {url.get_backend_name()!r}, but nightschool keeps its state in "
            f"sqlite or postgresql. Unset {URL_VARIABLE}, or write postgresql://user:password@host/database."
        )
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def schema_of(home: Home) -> str:
    """The PostgreSQL schema that holds the tables of a home."""
    return f"nightschool_{id_of(home)}"


def _create_engine(url: URL, home: Home) -> Engine:
    if url.get_backend_name() != "sqlite":
        try:
            engine = sa.create_engine(url, pool_pre_ping=True)
            schema = schema_of(home)
            sa.event.listen(engine, "connect", lambda connection, _: _look_in(connection, schema), insert=True)
            return engine
        except (NoSuchModuleError, ImportError) as error:
            raise UsageError(
                f"{URL_VARIABLE} names a PostgreSQL database, but its driver is missing ({error}). "
                f"Install it: pip install 'nightschool[postgres]'."
            ) from error
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_SECONDS})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _look_in(connection: Any, schema: str) -> None:
    """Let a new connection to PostgreSQL see the tables of one home alone."""
    before, connection.autocommit = connection.autocommit, True
    connection.execute(f'SET search_path TO "{schema}"')
    connection.autocommit = before


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # Python's sqlite3 would begin transactions late and by itself; `_begin_sqlite` does it instead.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(_BUSY_SECONDS * 1000)}")
    _use_write_ahead_log(cursor)
    cursor.execute("PRAGMA foreign_keys = ON")
    # What is forgotten is overwritten, not only unlinked.
    cursor.execute("PRAGMA secure_delete = ON")
    cursor.close()


def _use_write_ahead_log(cursor: sqlite3.Cursor) -> None:
    """Switch the file to its log, for as long as others keep it busy.

    Of two connections that switch at once SQLite refuses one without waiting, lest each waits for the other.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get("writes", False):
        # In WAL mode NORMAL would lose the newest transactions with the power, never more. It holds for the connection.
        connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if options['durable'] else 'NORMAL'}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql("BEGIN")


def _revision(engine: Engine) -> str | None:
    with _reading(engine) as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _migrate(home: Home, engine: Engine) -> None:
    """Apply what is missing, once, however many processes open the database at the same time."""
    from nightschool.store.migrations.upgrade import upgrade  # Alembic takes 0.2 s to import; mostly it is not needed.

    is_sqlite = engine.dialect.name == "sqlite"
    held = (
        lock(home.locks / "database.lock", "the layout of the database", wait_seconds=_MIGRATION_WAIT_SECONDS)
        if is_sqlite
        else nullcontext()
    )
    id_of(home)
    with held, _writing(engine) as connection:
        if not is_sqlite:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_POSTGRES_MIGRATION_LOCK)))
            _make_schema(connection, home)
        known = upgrade(connection)
    if not known:
        raise Conflict(
            f"The database was written by a newer nightschool (layout {_revision(engine)}); this one knows {HEAD}. "
            f"Install the newer nightschool again."
        )


def _is_used(home: Home) -> bool:
    """Whether anything was trained or published in a home."""
    return any(folder.is_dir() and any(folder.iterdir()) for folder in (home.runs, home.models))


def _make_schema(connection: Connection, home: Home) -> None:
    """Make the schema of a home, unless it is there; what older versions kept for it outside of one moves in.

    Raises:
        Conflict: If other homes kept theirs in the same tables, so that nobody knows whose a row is.
    """
    schema = schema_of(home)
    if schema in sa.inspect(connection).get_schema_names():
        return
    connection.execute(sa.schema.CreateSchema(schema))
    # Where older versions kept their tables: wherever the server puts those of whoever names no schema.
    connection.execute(sa.text("SET LOCAL search_path TO DEFAULT"))
    old_schema = connection.execute(sa.select(sa.func.current_schema())).scalar()
    old_tables = set(sa.inspect(connection).get_table_names(schema=old_schema)) & {*metadata.tables, "alembic_version"}
    others: set[str] = set()
    if "uploads" in old_tables:
        found = connection.execute(sa.text("SELECT DISTINCT home FROM uploads")).scalars()
        others = set(found) - {str(home.path)}
    connection.execute(sa.text(f'SET LOCAL search_path TO "{schema}"'))
    # Whoever has neither trained nor published anything yet did not write these tables.
    if "alembic_version" not in old_tables or not _is_used(home):
        return
    if others:
        raise Conflict(
            f"The tables in the schema {old_schema} of {URL_VARIABLE} hold rows of this home and of "
            f"{', '.join(sorted(others))}, and nothing tells them apart. Give each home a copy of that database."
        )
    for table in sorted(old_tables):
        connection.execute(sa.text(f'ALTER TABLE "{old_schema}"."{table}" SET SCHEMA "{schema}"'))
