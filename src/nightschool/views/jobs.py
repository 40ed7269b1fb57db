"""Jobs as people look at them: what the queue has, and how far their runs have come by what these write themselves.

A run that somebody started without the queue is shown as a job, too. Whoever asks writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from nightschool.errors import NotFound
from nightschool.events import Row, now, parse_row
from nightschool.store.home import Home
from nightschool.store.job_files import JobFiles
from nightschool.store.job_queue import Job, JobQueue
from nightschool.store.names import moment_of, split_name
from nightschool.store.runs import Run, RunStatus, RunStore
from nightschool.views.metrics_rows import is_number
from nightschool.views.runs import figures_by_step, seconds_left, tail, tried

DIRECT = "train"
"""The source of a run that was started directly: by `nightschool train`, or by a schedule."""


@dataclass(frozen=True)
class JobView:
    """One job now. `state` is `queued`, `running`, `paused`, `completed`, `failed` or `cancelled`.

    A run that was started directly has its run id as `id`, and may also be `interrupted`. `progress` is the share of its
    steps that are done. Losses are in nats per token; an accuracy is the share of tokens that were the likeliest.
    """

    id: str
    tenant: str
    name: str
    source: str
    state: str
    created_at: datetime
    progress: float = 0.0
    step: int = 0
    steps_total: int | None = None
    loss: float | None = None
    heldout_loss: float | None = None
    token_accuracy: float | None = None
    heldout_token_accuracy: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    run_id: str | None = None
    outcome: str | None = None
    candidate: str | None = None
    detail: str | None = None
    error: str | None = None
    attempts: int = 0
    shares_base_with: tuple[str, ...] = ()
    """Other jobs of the same tenant that train in its process, on the base that it has."""
    metadata: dict[str, Any] = field(default_factory=dict)
    created_by: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None


def job_view(home: Home, job: Job) -> JobView:
    """One job of the queue, with the figures of its run."""
    state, detail = _state_of(home, job)
    run = None if job.run_id is None else RunStore(home).at(job.run_id)
    return JobView(
        id=job.id,
        tenant=job.tenant,
        name=job.name,
        source=job.source,
        state=state,
        created_at=job.created_at,
        run_id=job.run_id,
        outcome=job.outcome,
        candidate=job.candidate,
        detail=detail,
        error=job.error,
        attempts=job.attempts,
        metadata=job.metadata,
        created_by=job.created_by,
        started_at=job.started_at,
        finished_at=job.finished_at,
        **({} if run is None else _figures(run, tried(lambda: run.status, None), running=state == "running")),
    )


def job_views(home: Home, queue: JobQueue, tenant: str | None = None, *, limit: int | None = None) -> list[JobView]:
    """The jobs of one tenant, or of all, newest first; among them the runs that were started directly."""
    jobs, of_jobs = queue.ls(tenant=tenant, limit=limit), queue.run_ids(tenant=tenant)
    direct = [run for run in RunStore(home).ls(tenant) if run.id not in of_jobs][:limit]
    views = [*(job_view(home, job) for job in jobs), *(run_view(run) for run in direct)]
    return sorted(views, key=lambda view: view.created_at, reverse=True)[:limit]


def find_job(home: Home, queue: JobQueue, job_id: str, tenant: str | None = None) -> JobView:
    """A job by its id, or by that of its run; a run that was started directly by its id.

    Raises:
        NotFound: If there is none, or it is another tenant's.
        NameRefused: If the id could not be one.
    """
    try:
        return _found(home, queue, queue.get(job_id, tenant=tenant))
    except NotFound:
        run = RunStore(home).at(job_id)
        if not run.status_path.is_file() or (tenant is not None and split_name(run.name)[0] != tenant):
            raise
    mine = [job for job in queue.ls(tenant=split_name(run.name)[0]) if job.run_id == run.id]
    return _found(home, queue, mine[0]) if mine else run_view(run)


def _found(home: Home, queue: JobQueue, job: Job) -> JobView:
    """One job, and who shares its base. Who does of other tenants is nobody's business."""
    running = queue.ls(tenant=job.tenant, states=("running",)) if job.group_id is not None else []
    beside = tuple(sorted(one.id for one in running if one.group_id == job.group_id and one.id != job.id))
    return replace(job_view(home, job), shares_base_with=beside)


def run_view(run: Run) -> JobView:
    """A run that was started directly."""
    tenant, name = split_name(run.name)
    status = tried(
        lambda: run.status, RunStatus(run_id=run.id, name=run.name, state="failed", error="status.json is damaged")
    )
    state = status.effective_state
    return JobView(
        id=run.id,
        tenant=tenant,
        name=name,
        source=DIRECT,
        state=state,
        created_at=moment_of(run.id.rpartition("-")[2]),
        run_id=run.id,
        candidate=status.candidate,
        error=status.error,
        attempts=1,
        started_at=_moment(status.started_at),
        finished_at=_moment(status.finished_at),
        **_figures(run, status, running=state == "running"),
    )


def _state_of(home: Home, job: Job) -> tuple[str, str | None]:
    """A job is only running while a process is at it, or a worker that is about to start one."""
    if job.state != "running":
        return job.state, job.detail
    owner = job.lease.owner
    watched = owner.lives if owner is not None and owner.is_here else (job.lease_until or now()) > now()
    if watched or JobFiles.of(home, job).process_lives:
        return job.state, {"cancelling": "It is being cancelled.", "pausing": "It is being paused."}.get(
            job.phase, job.detail
        )
    return "queued", "Its worker is gone; the next one goes on with it. Start one with nightschool worker."


def _figures(run: Run, status: RunStatus | None, *, running: bool) -> dict[str, Any]:
    if status is None:
        return {}
    rows = _last_rows(run)
    last = rows[-1] if rows else {}
    heldout, accuracies = (figures_by_step(rows, key) for key in ("heldout_loss", "heldout_token_accuracy"))
    # The status is written at checkpoints, the metrics at every step; a resumed run has both go back.
    step = max(status.step, int(last.get("step", 0))) if running else status.step
    total = status.steps_total
    return {
        "step": step,
        "steps_total": total,
        "progress": min(1.0, step / total) if total else 0.0,
        "loss": _number(last, "loss"),
        "heldout_loss": heldout[-1][1] if heldout else None,
        "token_accuracy": _number(last, "token_accuracy"),
        "heldout_token_accuracy": accuracies[-1][1] if accuracies else None,
        "tokens_per_second": _number(last, "tokens_per_second"),
        "eta_seconds": seconds_left(rows, total) if running else None,
    }


def _last_rows(run: Run) -> list[Row]:
    lines: Iterable[str] = tried(lambda: tail(run.metrics_path), "").splitlines()
    return [row for line in lines if (row := parse_row(line)) is not None]


def _number(row: Row, key: str) -> float | None:
    return row[key] if is_number(row.get(key)) else None


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
