"""The examples that promoted versions have learned: what replay draws from, and what is not new any more.

Each example belongs to the version that learned it. When that version is rolled back its examples leave the pool;
when it is promoted again they return. Where a newer version learned another answer to the same context, the older
example is replaced: it is in the pool only while no version with a newer answer is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from nightschool.data.example import CONVERSATIONS, Example
from nightschool.store.database import Database
from nightschool.store.tables import accepted_examples, accepted_versions, forgotten, is_name_in, key_of

Context = tuple[tuple[str, str], ...]


def origin_of(example: Example) -> str | None:
    """The request id of the conversation that an example was made of; None if its source is another one."""
    return example.id or None if example.source == CONVERSATIONS else None


@dataclass(frozen=True)
class Accepted:
    """One example as one version learned it. `active`: that version is the champion or one that it grew from."""

    version: str
    digest: str
    context: Context | None
    active: bool
    example: dict[str, Any]


class AcceptedExamples:
    """The accepted examples of a home, as the JSON objects that they came as (`Example.to_json`)."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, name: str, version: str, examples: Iterable[dict[str, Any]]) -> int:
        """Put what a promoted version has learned into the pool.

        An example that the version has already is left out, so that adding twice is the same as adding once. So is
        one that was made of a conversation which was forgotten.

        Returns:
            How many were added.
        """
        by_digest: dict[str, tuple[dict[str, Any], str | None]] = {}
        for row in examples:
            example = Example.from_json(row)
            by_digest.setdefault(example.digest, (row, origin_of(example)))
        with self._db.write() as connection:
            _mark(connection, name, version, active=True)
            present = set(
                connection.execute(
                    sa.select(accepted_examples.c.digest).where(
                        *is_name_in(accepted_examples, name), accepted_examples.c.version == version
                    )
                ).scalars()
            )
            gone = set(connection.execute(sa.select(forgotten.c.request_id)).scalars())
            rows = [
                {**key_of(name), "version": version, "digest": digest, "origin": origin, "example": row}
                for digest, (row, origin) in by_digest.items()
                if digest not in present and origin not in gone
            ]
            if rows:
                connection.execute(accepted_examples.insert(), rows)
        return len(rows)

    def shuffled(
        self, name: str, seed: int, *, without: str | None = None, but: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """The whole pool in the order of a seed, as it is without what one version learned, but for examples of some digests.

        Each example has its place in that order whatever else is in the pool, so that the first ones of a pool which
        grew by a few examples are almost the same.
        """
        pool = self._pool(name, without)
        order = sorted(pool.keys() - set(but), key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        return [pool[digest] for digest in order]

    def digests(self, name: str, *, without: str | None = None) -> set[str]:
        """The identities (`Example.digest`) of what the pool holds, without what one version learned."""
        return set(self._pool(name, without))

    def trained(self, name: str) -> set[str]:
        """The identities of all that a version of this name has learned, rolled back or replaced since or not."""
        with self._db.read() as connection:
            query = sa.select(accepted_examples.c.digest).where(*is_name_in(accepted_examples, name)).distinct()
            return set(connection.execute(query).scalars())

    def versions(self, name: str) -> set[str]:
        """The versions whose examples were added. Adding is one step, so each has all of its examples."""
        with self._db.read() as connection:
            query = sa.select(accepted_examples.c.version).where(*is_name_in(accepted_examples, name)).distinct()
            return set(connection.execute(query).scalars())

    def rows(self, name: str) -> list[Accepted]:
        """All that versions of this name have learned, in the order in which it was accepted."""
        columns = (
            accepted_examples.c.version,
            accepted_examples.c.digest,
            accepted_examples.c.example,
            accepted_versions.c.active,
        )
        query = sa.select(*columns).select_from(_joined()).where(*is_name_in(accepted_examples, name))
        with self._db.read() as connection:
            found = connection.execute(query.order_by(accepted_examples.c.id)).all()
        return [Accepted(v, digest, Example.from_json(row).context, active, row) for v, digest, row, active in found]

    def drop_version(self, name: str, version: str) -> None:
        """Take the examples of a version that was rolled back out of the pool; other versions' stay."""
        with self._db.write() as connection:
            _mark(connection, name, version, active=False)

    def restore_version(self, name: str, version: str) -> None:
        """Bring the examples of a version that is champion again back into the pool."""
        with self._db.write() as connection:
            _mark(connection, name, version, active=True)

    def _pool(self, name: str, without: str | None = None) -> dict[str, dict[str, Any]]:
        pool: dict[str, dict[str, Any]] = {}
        for row in current(row for row in self.rows(name) if row.version != without):
            pool.setdefault(row.digest, row.example)
        return pool


def current(rows: Iterable[Accepted]) -> list[Accepted]:
    """Those of active versions whose context no newer active version has answered otherwise, in their order."""
    active = [row for row in rows if row.active]
    newest: dict[Context, str] = {}
    for row in active:
        if row.context is not None:
            newest[row.context] = max(row.version, newest.get(row.context, ""))
    latest = {row.digest for row in active if row.context is not None and row.version == newest[row.context]}
    return [row for row in active if row.context is None or row.digest in latest]


def _joined() -> sa.Join:
    return accepted_examples.join(accepted_versions)


def _mark(connection: sa.Connection, name: str, version: str, *, active: bool) -> None:
    key = (*is_name_in(accepted_versions, name), accepted_versions.c.version == version)
    if not connection.execute(accepted_versions.update().where(*key).values(active=active)).rowcount:
        connection.execute(accepted_versions.insert().values(**key_of(name), version=version, active=active))
