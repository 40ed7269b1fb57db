"""Checking a memory: every row against its digest, every revision against its rows, the file against itself."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nightschool.memory.entry import entry_id
from nightschool.memory.store.connection import connect
from nightschool.memory.store.layout import CONTENT_COLUMNS, digest_of
from nightschool.memory.store.purge import is_pending

_MOST_FINDINGS = 100
_ROWS = f"SELECT row, {', '.join(CONTENT_COLUMNS)}, text_key, digest FROM rows WHERE row > ? ORDER BY row LIMIT ?"  # noqa: S608
_BORN_ELSEWHERE = (
    "SELECT row, entry, rows.born FROM rows JOIN revisions ON revision = rows.born WHERE row > last_row OR row <= coalesce("
    "(SELECT last_row FROM revisions before WHERE before.revision = rows.born - 1), 0)"
)
_REPLACES_ANOTHER = (
    "SELECT one.row, one.entry FROM rows one LEFT JOIN rows old ON old.row = one.replaces WHERE one.replaces IS NOT NULL "
    "AND (old.entry IS NOT one.entry OR old.died IS NOT one.born)"
)
_NOT_FOUND_AGAIN = (
    "SELECT row, entry FROM rows WHERE NOT EXISTS (SELECT 1 FROM addresses "
    "WHERE address = address_of(subject_key, relation_key, text_key) AND addresses.entry = rows.entry)"
)
_PAGE = 1000
_DIGESTED = {
    "revisions": "revision, at, author, operation, note, restores, last_row, born, ended, ended_rows, digest",
    "versions": "name, revision, at, author, digest",
    "purged": "row, entry, born, died, revision, digest",
}


@dataclass(frozen=True)
class Finding:
    """What is wrong, and with which entry, if that is known; or with which file of an index, in the memory's folder."""

    message: str
    entry: str | None = None
    row: int | None = None
    file: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Report:
    """What a check looked at and found. `findings` stops at a hundred."""

    rows: int = 0
    revisions: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not self.findings

    @property
    def is_whole_but_for_indexes(self) -> bool:
        """Whether all that is not as it was written is made of the rest, and can be made anew."""
        return bool(self.findings) and all(one.file is not None for one in self.findings)

    def to_json(self) -> dict[str, Any]:
        found = [one.to_json() for one in self.findings]
        return {"ok": self.is_whole, "rows": self.rows, "revisions": self.revisions, "findings": found}


def check(file: Path, mode: str) -> Report:
    """Read all of a memory's file, as one moment has it.

    Raises:
        sqlite3.Error: If it cannot be opened at all.
    """
    report = Report()
    connection = connect(file, mode)
    # A flipped bit may make bytes of text that are not UTF-8; then the digest says so.
    connection.text_factory = lambda text: text.decode(errors="replace")
    try:
        connection.execute("BEGIN")
        for part in (_rows, _tables, _counts, _places, _file):
            try:
                for finding in part(connection, report):
                    if len(report.findings) < _MOST_FINDINGS:
                        report.findings.append(finding)
            except (sqlite3.Error, OverflowError, ValueError) as error:
                report.findings.append(Finding(f"A part of the file cannot be read: {error}."))
    finally:
        connection.close()
    return report


def _rows(connection: sqlite3.Connection, report: Report) -> Iterator[Finding]:
    after = 0
    while found := connection.execute(_ROWS, (after, _PAGE)).fetchall():
        for one in found:
            row, *kept, digest = one
            if digest != digest_of(kept):
                yield _altered(row, kept[0], "is not what was written")
        report.rows += len(found)
        after = found[-1][0]


def _tables(connection: sqlite3.Connection, report: Report) -> Iterator[Finding]:
    for table, columns in _DIGESTED.items():
        for one in connection.execute(f"SELECT {columns} FROM {table}"):  # noqa: S608
            if digest_of(one[:-1]) != one[-1]:
                yield Finding(f"What is kept of {table} {one[0]!r} is not what was written.")
            report.revisions += table == "revisions"
    if is_pending(connection):
        yield Finding("A purge was cut off: what it deleted may still be in the file. Purge again to finish it.")


def _counts(connection: sqlite3.Connection, _: Report) -> Iterator[Finding]:
    """Each revision has as many rows as it wrote and ended: none is missing, and none was slipped in."""
    born, ended, ended_rows = Counter[int](), Counter[int](), Counter[int]()
    for table in ("rows", "purged"):
        born.update(dict(connection.execute(f"SELECT born, count(*) FROM {table} GROUP BY born").fetchall()))  # noqa: S608
        grouped = f"SELECT died, count(*), sum(row) FROM {table} WHERE died IS NOT NULL GROUP BY died"  # noqa: S608
        for revision, count, total in connection.execute(grouped):
            ended[revision] += count
            ended_rows[revision] += total
    expected = connection.execute(
        "SELECT revision, born, ended, ended_rows FROM revisions ORDER BY revision"
    ).fetchall()
    for place, (revision, num_born, num_ended, sum_ended) in enumerate(expected):
        if place != revision:
            yield Finding(f"Revision {place} is missing.")
            break
        if born[revision] != num_born:
            yield Finding(f"Revision {revision} wrote {num_born} rows, but {born[revision]} are there.")
        if (ended[revision], ended_rows[revision]) != (num_ended, sum_ended):
            yield _ended_elsewhere(connection, revision, ended[revision] - num_ended, ended_rows[revision] - sum_ended)
    for revision in (born.keys() | ended.keys()) - {one[0] for one in expected}:
        yield Finding(f"Rows name the revision {revision}, which is missing.")


def _places(connection: sqlite3.Connection, _: Report) -> Iterator[Finding]:
    """Each row was written by the revision that its number belongs to, and replaces a row of its own entry."""
    for row, entry, born in connection.execute(_BORN_ELSEWHERE):
        yield _altered(row, entry, f"says that it was written by revision {born}, which has other rows")
    for row, entry in connection.execute(_REPLACES_ANOTHER):
        yield _altered(row, entry, "replaces a row that is not of its entry, or did not end then")
    for row, entry in connection.execute(_NOT_FOUND_AGAIN):
        yield _altered(row, entry, "is not found by its subject and relation, or its sentence")


def _ended_elsewhere(connection: sqlite3.Connection, revision: int, too_many: int, row: int) -> Finding:
    """Of one row that is too many or missing, the sum of the numbers says which it is."""
    found = connection.execute("SELECT entry FROM rows WHERE row = ?", (abs(row),)).fetchone()
    if abs(too_many) == 1 and found is not None:
        return _altered(abs(row), found[0], f"does not end at revision {revision} as it did when that was written")
    return Finding(f"Other rows end at revision {revision} than when it was written.")


def _file(connection: sqlite3.Connection, _: Report) -> Iterator[Finding]:
    # It says the same of each row, and has full stops of its own now and then.
    found = (said.rstrip(".") for (said,) in connection.execute(f"PRAGMA integrity_check({_MOST_FINDINGS})"))
    for said in dict.fromkeys(found):
        if said != "ok":
            yield Finding(f"SQLite finds: {said}.")


def _altered(row: Any, entry: Any, what: str) -> Finding:
    # The entry's number may be what was altered.
    is_number = isinstance(entry, int) and entry > 0
    name = entry_id(entry) if is_number else None
    return Finding(f"Row {row} of {name or 'an entry'} {what}.", name, row)
