"""Whose turn it is in the queue of jobs: the statements that ask for it, and the choice among what they find."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from nightschool.store.tables import jobs, tenants
from nightschool.work.lease import Lease

if TYPE_CHECKING:
    from nightschool.store.job_queue import Job

LONGEST_PAUSE_SECONDS = 3600.0
OLDEST_FIRST = (jobs.c.created_at, jobs.c.id)


RUNNING = (
    sa.select(jobs.c.id, jobs.c.tenant, jobs.c.name, jobs.c.owner, jobs.c.lease_until, jobs.c.group_id)
    .where(jobs.c.state == "running")
    .order_by(*OLDEST_FIRST)
)


def _of_each_tenant() -> sa.Select[Any]:
    """The oldest job of each tenant that may begin now, whatever the number of those behind it.

    From one tenant to the next, and to the oldest job of each, it goes by the index of states, tenants and moments.
    """
    queued, other, running = (jobs.alias(name) for name in ("queued", "other", "running"))
    first = sa.select(sa.func.min(jobs.c.tenant).label("tenant")).where(jobs.c.state == "queued")
    waiting = first.cte("waiting", recursive=True)
    behind = sa.select(sa.func.min(other.c.tenant)).where(other.c.state == "queued", other.c.tenant > waiting.c.tenant)
    waiting = waiting.union_all(sa.select(behind.scalar_subquery()).where(waiting.c.tenant.is_not(None)))
    same_name = sa.select(running.c.id).where(
        running.c.state == "running", running.c.tenant == queued.c.tenant, running.c.name == queued.c.name
    )
    oldest = (
        sa.select(queued.c.id)
        .where(queued.c.state == "queued", queued.c.tenant == waiting.c.tenant, may_begin(queued), ~same_name.exists())
        .order_by(queued.c.created_at, queued.c.id)
        .limit(1)
    )
    heads = sa.select(oldest.correlate(waiting).scalar_subquery()).where(waiting.c.tenant.is_not(None))
    return sa.select(jobs.c.id, jobs.c.tenant, jobs.c.created_at).where(jobs.c.id.in_(heads))


def may_begin(table: sa.FromClause) -> sa.ColumnElement[bool]:
    """Whether a job does not wait for a moment; the parameters are `now` and `latest`, which is a pause later."""
    # Longer than the longest pause is no pause: the clock was put back.
    waits = table.c.not_before.between(_moment("now"), _moment("latest"))
    return sa.or_(table.c.not_before.is_(None), sa.not_(waits))


def _moment(name: str) -> sa.BindParameter[datetime]:
    return sa.bindparam(name, type_=jobs.c.created_at.type)


# Built once: building a statement takes longer than asking SQLite.
_OLDEST_OF_EACH_TENANT = _of_each_tenant()
_BOUNDS = sa.select(tenants.c.name, tenants.c.running_trainings).where(tenants.c.running_trainings.is_not(None))
BEGIN = (
    jobs.update()
    .where(jobs.c.id == sa.bindparam("chosen"))
    .values(
        state="running",
        not_before=None,
        detail=None,
        attempts=jobs.c.attempts + 1,
        started_at=sa.func.coalesce(jobs.c.started_at, _moment("now")),
        owner=sa.bindparam("new_owner"),
        lease_until=_moment("until"),
    )
    .returning(jobs)
)


def beginning(job_id: str, moment: datetime, lease: Lease) -> dict[str, Any]:
    """The parameters of `BEGIN`."""
    columns = lease.columns
    return {"chosen": job_id, "now": moment, "new_owner": columns["owner"], "until": columns["lease_until"]}


def now_and_latest(moment: datetime) -> dict[str, datetime]:
    """The parameters of `may_begin`."""
    return {"now": moment, "latest": moment + timedelta(seconds=LONGEST_PAUSE_SECONDS)}


def bounds_of_tenants(connection: sa.Connection) -> dict[str, int]:
    """How many jobs of a tenant may run at once, of the tenants that have a bound."""
    return {row.name: row.running_trainings for row in connection.execute(_BOUNDS)}


def next_queued(connection: sa.Connection, running: Sequence[Any], moment: datetime) -> str | None:
    """The oldest job that may begin, of the tenant that has the fewest running."""
    counts, bounds = Counter(job.tenant for job in running), bounds_of_tenants(connection)
    heads = connection.execute(_OLDEST_OF_EACH_TENANT, now_and_latest(moment))
    may = [job for job in heads if counts[job.tenant] < bounds.get(job.tenant, sys.maxsize)]
    first = min(may, key=lambda job: (counts[job.tenant], job.created_at, job.id), default=None)
    return None if first is None else first.id


def fairly(found: Sequence[Job], running: Sequence[Any], bounds: Mapping[str, int], most: int) -> list[Job]:
    """At most so many of the jobs that were found, oldest first, chosen one after the other as `claim` would."""
    known = {job.id for job in found}
    others = [job for job in running if job.id not in known]
    counts, names = Counter(job.tenant for job in others), {(job.tenant, job.name) for job in others}
    left: list[Job] = list(found)
    chosen: list[Job] = []
    while len(chosen) < most:
        may = [job for job in left if (job.tenant, job.name) not in names]
        may = [job for job in may if counts[job.tenant] < bounds.get(job.tenant, sys.maxsize)]
        if not may:
            break
        job = min(may, key=lambda job: counts[job.tenant])
        left.remove(job)
        chosen.append(job)
        counts[job.tenant] += 1
        names.add((job.tenant, job.name))
    return chosen
