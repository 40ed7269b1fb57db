"""The examples that promoted versions have learned: what replay draws from, and what is not new any more.

Each example belongs to the version that learned it. When that version is rolled back its examples leave the pool;
when it is promoted again they return. Where a newer version learned another answer to the same context, the older
example is replaced: it is in the pool only while no version with a newer answer is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from nightschool.store.database import Database
from nightschool.store.tables import accepted_examples, accepted_versions, forgotten, is_name_in, key_of


def example_digest(example: dict[str, Any]) -> str:
    """The identity of an example: 32 hex digits over its content alone, the same as `Example.digest`."""
    if example.get("messages"):
        content: Any = [[m["role"], m["content"], float(m.get("weight", 1.0))] for m in example["messages"]]
    else:
        content = example.get("text")
    canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def example_origin(example: dict[str, Any]) -> str | None:
    """The request id of the conversation that an example was made of: its `id`, if its source is `conversations`."""
    return example.get("id") or None if example.get("source") == "conversations" else None


def example_context(example: dict[str, Any]) -> str | None:
    """What an example answers, the same as `Example.context`, as one text; None if it answers no question."""
    *before, last = example.get("messages") or [{"role": ""}]
    if last["role"] != "assistant" or all(message["role"] != "user" for message in before):
        return None
    return json.dumps([[message["role"], message["content"]] for message in before], ensure_ascii=False)


@dataclass(frozen=True)
class Accepted:
    """One example as one version learned it. `active`: that version is the champion or one that it grew from."""

    version: str
    digest: str
    context: str | None
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
        by_digest: dict[str, dict[str, Any]] = {}
        for example in examples:
            by_digest.setdefault(example_digest(example), example)
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
                {
                    **key_of(name),
                    "version": version,
                    "digest": digest,
                    "origin": example_origin(example),
                    "example": example,
                }
                for digest, example in by_digest.items()
                if digest not in present and example_origin(example) not in gone
            ]
            if rows:
                connection.execute(accepted_examples.insert(), rows)
        return len(rows)

    def all(self, name: str) -> list[dict[str, Any]]:
        """Every example in the pool once, in the order in which they were first accepted."""
        return list(self._pool(name).values())

    def sample(self, name: str, count: int, seed: int) -> list[dict[str, Any]]:
        """`count` examples of the pool, or all if there are fewer; the same for the same pool and seed."""
        return self.shuffled(name, seed)[: max(count, 0)]

    def shuffled(self, name: str, seed: int, *, without: str | None = None) -> list[dict[str, Any]]:
        """The whole pool in the order of a seed, as it is without what one version learned.

        Each example has its place in that order whatever else is in the pool, so that the first ones of a pool which
        grew by a few examples are almost the same.
        """
        pool = self._pool(name, without)
        order = sorted(pool, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        return [pool[digest] for digest in order]

    def count(self, name: str) -> int:
        """How many different examples the pool holds."""
        return len(self._pool(name))

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
        return [Accepted(v, digest, example_context(example), active, example) for v, digest, example, active in found]

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
    newest: dict[str, str] = {}
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
