"""The ledger: every cycle of a schedule that was begun, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from nightschool.errors import Conflict, Locked, NotFound, UsageError
from nightschool.events import now
from nightschool.store.database import Database
from nightschool.store.names import full_name
from nightschool.store.tables import cycles, is_name_in, key_of, schedules
from nightschool.work.identity import ProcessIdentity

Outcome = Literal["promoted", "published", "refused", "skipped", "failed", "interrupted"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Cycle:
    """One cycle. While it is under way `finished_at` and `outcome` are None, and `owner` is the process that does it."""

    id: int
    name: str
    due_at: datetime
    trigger: str
    owner: str | None
    started_at: datetime
    finished_at: datetime | None = None
    outcome: Outcome | None = None
    detail: str | None = None
    run_id: str | None = None
    candidate: str | None = None
    data_fingerprint: str | None = None


class Ledger:
    """The cycles of all names of a home. Of two schedulers, only one can begin a cycle."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def begin(self, name: str, due_at: datetime, trigger: str) -> int:
        """Enter a cycle before anything of it is done. Returns its id.

        Args:
            name: The name that is trained.
            due_at: When the cycle was due, with its time zone; no two cycles of a name share it.
            trigger: Why it began: "schedule", "start", "manual", …

        Raises:
            Locked: If another scheduler has begun this cycle and not finished it.
            Conflict: If this cycle was finished before.
        """
        owner = str(ProcessIdentity.mine())
        row = key_of(name) | {"due_at": due_at, "trigger": trigger, "owner": owner, "started_at": now()}
        try:
            with self._db.write() as connection:
                key = connection.execute(cycles.insert().values(row)).inserted_primary_key
                assert key is not None
                return int(key[0])
        except IntegrityError as error:
            with self._db.read() as connection:
                other = _load(connection, *is_name_in(cycles, name), cycles.c.due_at == due_at)[0]
            if other.outcome is None:
                raise Locked(
                    f"The cycle of {name!r} that was due at {due_at.isoformat()} was begun by process {other.owner} at "
                    f"{other.started_at.isoformat()}. Leave it to that scheduler, or stop that one."
                ) from error
            raise Conflict(
                f"The cycle of {name!r} that was due at {due_at.isoformat()} is done already ({other.outcome}). "
                f"Begin the next one."
            ) from error

    def finish(
        self,
        cycle_id: int,
        outcome: Outcome,
        detail: str | None = None,
        run_id: str | None = None,
        candidate: str | None = None,
        data_fingerprint: str | None = None,
    ) -> Cycle:
        """Enter how a cycle ended.

        Raises:
            UsageError: If there is no such outcome.
            NotFound: If there is no such cycle.
            Conflict: If it was finished before.
        """
        if outcome not in OUTCOMES:
            raise UsageError(f"There is no outcome {outcome!r}. Outcomes are {', '.join(OUTCOMES)}.")
        values: dict[str, Any] = {
            "outcome": outcome,
            "finished_at": now(),
            "detail": detail,
            "run_id": run_id,
            "candidate": candidate,
            "data_fingerprint": data_fingerprint,
        }
        with self._db.write() as connection:
            found = _load(connection, cycles.c.id == cycle_id)
            if not found:
                raise NotFound(f"There is no cycle {cycle_id} in the ledger. List the cycles.")
            if found[0].outcome is not None:
                raise Conflict(
                    f"The cycle {cycle_id} is finished already ({found[0].outcome}), so it cannot be {outcome}."
                )
            connection.execute(cycles.update().where(cycles.c.id == cycle_id).values(values))
            return _load(connection, cycles.c.id == cycle_id)[0]

    def last(self, name: str) -> Cycle | None:
        """The cycle of a name that was due last, finished or not."""
        return next(iter(self.ls(name, limit=1)), None)

    def ls(self, name: str, *, limit: int | None = None) -> list[Cycle]:
        """The cycles of a name, the one due last first."""
        with self._db.read() as connection:
            return _load(connection, *is_name_in(cycles, name), limit=limit)

    def names(self) -> list[str]:
        """The names that have a cycle, in order."""
        with self._db.read() as connection:
            query = sa.select(cycles.c.tenant, cycles.c.name).distinct().order_by(cycles.c.tenant, cycles.c.name)
            return [full_name(tenant, name) for tenant, name in connection.execute(query)]

    def pause(self, name: str) -> None:
        """Let no cycle of a name begin by the clock until `resume`. Pausing twice is the same as once."""
        if not self.paused(name):
            self._set_paused(name, now())

    def resume(self, name: str) -> None:
        """Let cycles begin by the clock again."""
        self._set_paused(name, None)

    def paused(self, name: str) -> bool:
        """Whether a name is paused."""
        return self.paused_at(name) is not None

    def paused_at(self, name: str) -> datetime | None:
        """Since when a name is paused, or None."""
        with self._db.read() as connection:
            return connection.execute(sa.select(schedules.c.paused_at).where(*is_name_in(schedules, name))).scalar()

    def _set_paused(self, name: str, moment: datetime | None) -> None:
        with self._db.write() as connection:
            update = schedules.update().where(*is_name_in(schedules, name)).values(paused_at=moment)
            if not connection.execute(update).rowcount:
                connection.execute(schedules.insert().values(**key_of(name), paused_at=moment))


def _load(connection: sa.Connection, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> list[Cycle]:
    query = sa.select(cycles).where(*conditions).order_by(cycles.c.due_at.desc(), cycles.c.id.desc()).limit(limit)
    rows = (dict(row._mapping) for row in connection.execute(query))
    return [Cycle(**row | {"name": full_name(row.pop("tenant"), row["name"])}) for row in rows]
