"""What happened to rows between two revisions, in order: what an index follows."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Literal

from nightschool.memory.entry import RowChange
from nightschool.memory.store import rows
from nightschool.memory.store.connection import Connections

_PAGE = 1000
_BORN = "SELECT {columns} FROM rows WHERE row > :after AND row <= :end ORDER BY row LIMIT :page"
_DIED = (
    "SELECT died, row FROM rows WHERE died IS NOT NULL AND died >= ? AND (died, row) > (?, ?) AND died <= ? "
    "ORDER BY died, row LIMIT ?"
)
_PURGED = (
    "SELECT revision, row FROM purged WHERE revision >= ? AND (revision, row) > (?, ?) AND revision <= ? "
    "ORDER BY revision, row LIMIT ?"
)

_Placed = tuple[int, int, int, RowChange]


def changes_between(connections: Connections, revision: int, newest: int) -> Iterator[RowChange]:
    """The changes after `revision` up to `newest`. Read a page at a time, so that writers wait for nobody."""
    streams = (
        _births(connections, revision, newest),
        _pages(connections, _DIED, "died", 1, revision, newest),
        _pages(connections, _PURGED, "purged", 2, revision, newest),
    )
    for _, _, _, change in heapq.merge(*streams, key=lambda one: one[:3]):
        yield change


def _births(connections: Connections, revision: int, newest: int) -> Iterator[_Placed]:
    with connections.reading() as connection:
        after, end = rows.last_row(connection, revision), rows.last_row(connection, newest)
    while True:
        with connections.reading() as connection:
            found = list(rows.found_by(connection, _BORN, {"after": after, "end": end, "page": _PAGE}))
        for one in found:
            yield one.born, 0, one.row, RowChange(one.born, "born", one.row, one)
        if len(found) < _PAGE:
            return
        after = found[-1].row


def _pages(
    connections: Connections, query: str, kind: Literal["died", "purged"], order: int, revision: int, newest: int
) -> Iterator[_Placed]:
    at, row = revision + 1, 0
    while True:
        with connections.reading() as connection:
            found = connection.execute(query, (at, at, row, newest, _PAGE)).fetchall()
        for at, row in found:
            yield at, order, row, RowChange(at, kind, row)
        if len(found) < _PAGE:
            return
