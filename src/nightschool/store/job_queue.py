"""The queue of training jobs: who waits, who is at work on what, and how each one ended.

A job is `queued`, `running` while a worker with a lease is at it, `paused`, or at its end: `completed`, `failed` or
`cancelled`, which nothing changes any more. What a job does is not done here; see `jobs/worker.py`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from nightschool.config.shared_base import share_key
from nightschool.errors import Conflict, NotFound, QuotaExceeded
from nightschool.events import now
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.job_turns import (
    BEGIN,
    OLDEST_FIRST,
    RUNNING,
    beginning,
    bounds_of_tenants,
    fairly,
    may_begin,
    next_queued,
    now_and_latest,
)
from nightschool.store.names import check_name, full_name, home_of
from nightschool.store.outbox import EventType, announce
from nightschool.store.registry import Registry
from nightschool.store.tables import jobs
from nightschool.store.tenants import quota_of
from nightschool.work.identity import ProcessIdentity
from nightschool.work.lease import Lease, Leased

JobState = Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
FinalState = Literal["completed", "failed", "cancelled"]
JOB_STATES: tuple[JobState, ...] = get_args(JobState)
FINAL_STATES: tuple[FinalState, ...] = get_args(FinalState)
_Changes = dict[str, dict[str, Any]]
# On another machine, a lease ends after this long without a sign of life.
LEASE_SECONDS = 60.0
# Of those that may share a base, the oldest; who is behind them has no hope yet.
_MOST_LOOKED_AT = 1000


@dataclass(frozen=True)
class Job(Leased):
    """One job as the queue keeps it.

    Whoever submits one gives the first seven; the queue and the workers fill in the others.
    """

    id: str
    tenant: str
    name: str
    recipe: dict[str, Any]
    """The plain values of a validated `Recipe`."""
    root: str
    """Where relative paths of the recipe begin."""
    source: str
    """Who submitted it: `api`, `openai` or `cli`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    created_by: str | None = None
    state: JobState = "queued"
    attempts: int = 0
    deaths: int = 0
    last_step: int = 0
    cancel_requested_at: datetime | None = None
    pause_requested_at: datetime | None = None
    not_before: datetime | None = None
    owner: str | None = None
    lease_until: datetime | None = None
    run_id: str | None = None
    outcome: str | None = None
    """How its cycle ended: `promoted`, `published`, `refused` or `failed`."""
    candidate: str | None = None
    detail: str | None = None
    """What is to be said of it now: why it waits, what the gate decided."""
    error: str | None = None
    created_at: datetime = field(default_factory=now)
    started_at: datetime | None = None
    finished_at: datetime | None = None
    share_key: str | None = None
    """What it has in common with those that it may share a base with; None for one that trains alone."""
    group_id: str | None = None
    """Where it trains beside others on one base: the same for all of them."""

    @property
    def full_name(self) -> str:
        """`tenant/name`, or the name alone for the default tenant."""
        return full_name(self.tenant, self.name)

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def phase(self) -> str:
        """Its state, or `cancelling` or `pausing` where it runs until its worker has ended it."""
        if self.state == "running" and self.cancel_requested_at is not None:
            return "cancelling"
        return "pausing" if self.state == "running" and self.pause_requested_at is not None else self.state


def new_id(prefix: str = "train_", digits: int = 12) -> str:
    """An id that no job has: `prefix` and so many random hexadecimal digits."""
    return prefix + secrets.token_hex((digits + 1) // 2)[:digits]


def job_folder(home: Home, tenant: str, job_id: str) -> Path:
    """Where a job's data, its log and its result lie. Raises NameRefused if either is no name."""
    return home_of(home, tenant).jobs / check_name(job_id, what="job")


class JobQueue:
    """The jobs of all tenants of a home."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._seen: dict[ProcessIdentity, tuple[float, bool]] = {}

    @property
    def home(self) -> Home:
        """Whose jobs they are."""
        return self._db.home

    def submit(self, job: Job) -> Job:
        """Enter a job, and with whom it may share a base; its folder, with whatever data it needs, is there already.

        Raises:
            NameRefused: If its id, tenant or name may not become a path.
            Conflict: If there is a job with this id.
            QuotaExceeded: If its tenant has as many open jobs, or as many versions, as it may have.
        """
        check_name(job.id, what="job")
        check_name(job.tenant, what="tenant")
        check_name(job.name)
        job = replace(job, share_key=share_key(job.recipe, job.root))
        try:
            with self._db.write(alone_in=jobs) as connection:
                _refuse_over_quota(connection, self._db.home, job.tenant)
                connection.execute(jobs.insert().values(**asdict(job)))
        except IntegrityError as error:
            raise Conflict(f"There is a job {job.id} already. Submit this one under another id.") from error
        return job

    def get(self, job_id: str, *, tenant: str | None = None) -> Job:
        """A job by its id; with `tenant`, only if it is that one's.

        Raises:
            NotFound: If there is none; the same where it is another tenant's.
        """
        with self._db.read() as connection:
            return _get(connection, job_id, tenant)

    def ls(
        self,
        *,
        tenant: str | None = None,
        states: Iterable[JobState] | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> list[Job]:
        """The jobs, newest first: of one tenant, in some states, at most `limit`, older than the job `after`.

        Raises:
            NotFound: If there is no job `after`.
        """
        conditions = [] if tenant is None else [jobs.c.tenant == tenant]
        if states is not None:
            conditions.append(jobs.c.state.in_(list(states)))
        with self._db.read() as connection:
            if after is not None:
                last = _get(connection, after, tenant)
                conditions.append(sa.tuple_(jobs.c.created_at, jobs.c.id) < (last.created_at, last.id))
            return _load(connection, *conditions, limit=limit)

    def run_ids(self, *, tenant: str | None = None) -> set[str]:
        """The runs that jobs have become, of one tenant or of all."""
        query = sa.select(jobs.c.run_id).where(jobs.c.run_id.is_not(None))
        with self._db.read() as connection:
            return set(connection.execute(query if tenant is None else query.where(jobs.c.tenant == tenant)).scalars())

    def request_cancel(self, job_id: str, *, tenant: str | None = None) -> Job:
        """Cancel a job that waits at once, and let the worker end one that runs.

        Raises:
            NotFound: As `get` does.
            Conflict: If it has ended.
        """
        moment = now()
        ended = {"state": "cancelled", "finished_at": moment, "detail": None}
        asked = {"cancel_requested_at": moment}
        changes: _Changes = {"queued": ended, "paused": ended, "running": asked, "pausing": asked, "cancelling": {}}
        return self._change(job_id, tenant, "cancelled", changes)

    def pause(self, job_id: str, *, tenant: str | None = None) -> Job:
        """Let a job wait until `resume`; one that runs saves its state first.

        Raises:
            NotFound: As `get` does.
            Conflict: If it is being cancelled, or has ended.
        """
        asked = {"pause_requested_at": now()}
        changes: _Changes = {
            "queued": {"state": "paused", "detail": None},
            "running": asked,
            "pausing": {},
            "paused": {},
        }
        return self._change(job_id, tenant, "paused", changes)

    def resume(self, job_id: str, *, tenant: str | None = None) -> Job:
        """Let a paused job go on where it stopped.

        Raises:
            NotFound: As `get` does.
            Conflict: If it is neither paused nor about to be.
        """
        changes: _Changes = {"paused": {"state": "queued", "not_before": None}, "pausing": {"pause_requested_at": None}}
        return self._change(job_id, tenant, "resumed", changes)

    def claim(self, *, seconds: float = LEASE_SECONDS, most_running: int) -> Job | None:
        """Take a job for this process, for so long without a sign of life. None if there is nothing to do.

        A job whose worker is gone comes first, then the oldest of the tenant that has the fewest running. Of two
        workers only one gets it; no two jobs of one name run at once, and no more than `most_running` on a machine, where
        those that share a base count as one.
        """
        moment = now()
        lease = Lease.begin(moment, seconds)
        with self._db.write(alone_in=jobs, durable=False) as connection:
            running = connection.execute(RUNNING).all()
            held = [job for job in running if self._is_held(Lease.read(job.owner, job.lease_until), moment)]
            at_work = {job.group_id or job.id for job in held if _is_here(job.owner)}
            is_full = len(at_work) >= most_running
            lapsed = [job.id for job in running if job not in held and (not is_full or job.group_id in at_work)]
            if is_full and not lapsed:
                return None
            chosen = lapsed[0] if lapsed else next_queued(connection, running, moment)
            if chosen is None:
                return None
            return Job(**connection.execute(BEGIN, beginning(chosen, moment, lease)).one()._mapping)

    def claim_beside(
        self, job: Job, *, most: int, may_join: Callable[[Job], bool], seconds: float = LEASE_SECONDS
    ) -> list[Job]:
        """Take further jobs for this process, at most so many, that share the base of one that it holds.

        Whose turn it is among them, and who has to wait, is as in `claim`; the worker that had one of them may be gone.
        Returns that one and them, oldest first, which are a group from now on, or it alone.
        """
        moment = now()
        lease = Lease.begin(moment, seconds)
        with self._db.write(alone_in=jobs, durable=False) as connection:
            running = connection.execute(RUNNING).all()
            lapsed = [one.id for one in running if not self._is_held(Lease.read(one.owner, one.lease_until), moment)]
            waits = sa.and_(jobs.c.state == "queued", may_begin(jobs))
            alike = jobs.c.share_key == job.share_key
            query = sa.select(jobs).where(alike, sa.or_(waits, jobs.c.id.in_(lapsed))).order_by(*OLDEST_FIRST)
            rows = connection.execute(query.limit(_MOST_LOOKED_AT), now_and_latest(moment))
            found = [one for one in (Job(**row._mapping) for row in rows) if may_join(one)]
            beside = fairly(found, running, bounds_of_tenants(connection), most)
            group = {"group_id": new_id("group_") if beside else None}
            mine = (jobs.c.id == job.id) & (jobs.c.state == "running") & (jobs.c.owner == job.owner)
            first = _updated(connection, mine, group)
            if first is None:
                raise _not_ours(job)
            others = [connection.execute(BEGIN, beginning(one.id, moment, lease)).one().id for one in beside]
            is_other = jobs.c.id.in_(others)
            connection.execute(jobs.update().where(is_other).values(group))
            return [first, *reversed(_load(connection, is_other))]

    def _is_held(self, lease: Lease, moment: datetime) -> bool:
        """Whether a process is at a row; whether another one of this machine lives is asked once a second."""
        if lease.owner is None or not lease.owner.is_here:
            return lease.is_held_by_another(moment)
        if lease.owner == ProcessIdentity.mine():
            return True
        seen_at, lives = self._seen.get(lease.owner, (-1.0, False))
        if not lives or time.monotonic() - seen_at > 1.0:
            lives = lease.owner.lives
            self._seen[lease.owner] = (time.monotonic(), lives)
        return lives

    def leave_group(self, job: Job) -> Job:
        """Let a job of a group train alone.

        Raises:
            Conflict: If this process does not hold it any more.
        """
        return self._as_holder(job, {"group_id": None})

    def heartbeat(self, job: Job, *, seconds: float = LEASE_SECONDS) -> Job:
        """Keep a job, and return what the queue has of it now: somebody may have cancelled it.

        Raises:
            Conflict: If this process does not hold it any more.
        """
        return self._as_holder(job, {"lease_until": job.lease.heartbeat(now(), seconds).until})

    def note_run(self, job_id: str, run_id: str) -> None:
        """Keep which run a job has become, before anything of it is trained. Its own process says so, not the worker.

        Raises:
            Conflict: If the job does not run, or has become another run.
        """
        with self._db.write() as connection:
            fresh = (jobs.c.id == job_id) & (jobs.c.state == "running") & jobs.c.run_id.is_(None)
            if not connection.execute(jobs.update().where(fresh).values(run_id=run_id)).rowcount:
                raise Conflict(
                    f"The job {job_id} is done elsewhere, or not at all any more. The run {run_id} is not its."
                )

    def finish(self, job: Job, state: FinalState, **facts: Any) -> Job:
        """End a job: `facts` are some of `outcome`, `candidate`, `run_id`, `detail`, `error`.

        Raises:
            Conflict: If this process does not hold it any more.
        """
        return self._as_holder(job, {"state": state, "finished_at": now(), **_NOBODY, **facts})

    def release(self, job: Job, *, seconds: float = 0.0, began: bool = True, **facts: Any) -> Job:
        """Give a job back, to be claimed again after `seconds`; one that is to pause is paused now.

        Without having begun, it was no attempt. `facts` are some of `detail`, `deaths`, `last_step`.

        Raises:
            Conflict: If this process does not hold it any more.
        """
        paused = jobs.c.pause_requested_at.is_not(None)
        values = {
            "state": sa.case((paused, "paused"), else_="queued"),
            "pause_requested_at": None,
            "attempts": jobs.c.attempts - (0 if began else 1),
            "not_before": now() + timedelta(seconds=seconds) if seconds else None,
            **_NOBODY,
        }
        return self._as_holder(job, values | facts)

    def _as_holder(self, job: Job, values: dict[str, Any]) -> Job:
        """Change a job that this process holds. After a power cut its folder tells the same once more."""
        mine = (jobs.c.id == job.id) & (jobs.c.state == "running") & (jobs.c.owner == job.owner)
        with self._db.write(durable=False) as connection:
            found = None if job.owner is None else _updated(connection, mine, values)
            if found is None:
                raise _not_ours(job)
            return _told(connection, found)

    def _change(self, job_id: str, tenant: str | None, done: str, changes: _Changes) -> Job:
        """Change a job as what it is at asks for."""
        with self._db.write(alone_in=jobs) as connection:
            job = _get(connection, job_id, tenant)
            values = changes.get(job.phase)
            if values is None:
                raise Conflict(f"The job {job_id} is {job.phase}, so it cannot be {done}.")
            if values:
                connection.execute(jobs.update().where(jobs.c.id == job_id).values(values))
            return _told(connection, _get(connection, job_id))


# What its tenant is told when a job has ended, in OpenAI's words.
_TOLD: dict[str, EventType] = {
    "completed": "fine_tuning.job.succeeded",
    "failed": "fine_tuning.job.failed",
    "cancelled": "fine_tuning.job.cancelled",
}


def _told(connection: sa.Connection, job: Job) -> Job:
    """The job, after its tenant was told if it has ended."""
    if job.is_final:
        data = {"id": job.id, "model": job.full_name, "version": job.candidate, "outcome": job.outcome}
        announce(connection, job.tenant, _TOLD[job.state], data, key=job.id)
    return job


def _not_ours(job: Job) -> Conflict:
    return Conflict(f"The job {job.id} is not this worker's any more: another worker has taken it over, or it ended.")


_NOBODY: dict[str, Any] = {"owner": None, "lease_until": None, "group_id": None}


def _is_here(owner: str) -> bool:
    identity = ProcessIdentity.parse(owner)
    return identity is not None and identity.is_here


def _updated(connection: sa.Connection, condition: sa.ColumnElement[bool], values: dict[str, Any]) -> Job | None:
    """The row of that condition after the change; None if there is none."""
    row = connection.execute(jobs.update().where(condition).values(values).returning(jobs)).first()
    return None if row is None else Job(**row._mapping)


def _refuse_over_quota(connection: sa.Connection, home: Home, tenant: str) -> None:
    quota = quota_of(connection, tenant)
    if quota.open_trainings is not None:
        is_open = jobs.c.state.not_in(FINAL_STATES)
        count = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.tenant == tenant, is_open)
        there = connection.execute(count).scalar_one()
        if there >= quota.open_trainings:
            raise QuotaExceeded(
                f"The tenant {tenant} has {there} jobs that wait or run, and may have {quota.open_trainings}. "
                f"Wait until one has ended, or cancel one.",
                retry_after_seconds=60,
            )
    if quota.stored_versions is not None:
        registry = Registry(home)
        stored = sum(len(registry.versions(name)) for name in registry.names(tenant))
        if stored >= quota.stored_versions:
            raise QuotaExceeded(
                f"The tenant {tenant} has {stored} published versions, and may have {quota.stored_versions}. "
                f"Remove some that nothing points at, with nightschool models rm.",
                retry_after_seconds=3600,
            )


def _get(connection: sa.Connection, job_id: str, tenant: str | None = None) -> Job:
    conditions = [jobs.c.id == job_id] if tenant is None else [jobs.c.id == job_id, jobs.c.tenant == tenant]
    found = _load(connection, *conditions)
    if not found:
        raise NotFound(f"There is no job {job_id}. List them with nightschool jobs ls.")
    return found[0]


def _load(connection: sa.Connection, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> list[Job]:
    query = sa.select(jobs).where(*conditions).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
    return [Job(**row._mapping) for row in connection.execute(query)]
