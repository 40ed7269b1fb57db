"""Jobs, their events and their checkpoints, as OpenAI's clients read them. All of it reads from the disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from nightschool.errors import NotFound
from nightschool.events import Row, now, read_events
from nightschool.server.openai.job_schema import JobStatus
from nightschool.server.openai.model_names import fine_tuned_checkpoint, fine_tuned_model
from nightschool.server.service import published_at
from nightschool.store.checkpoints import step_of
from nightschool.store.files import FileStore, results_id
from nightschool.store.home import Home
from nightschool.store.job_queue import Job
from nightschool.store.registry import Registry
from nightschool.store.runs import Run, RunStore
from nightschool.views.jobs import JobView, job_view
from nightschool.views.metrics_rows import is_number, read_rows
from nightschool.views.runs import tried

_STATUS: dict[str, JobStatus] = {
    "queued": "queued",
    "running": "running",
    "paused": "paused",
    "completed": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
_Event = tuple[datetime, dict[str, Any]]
_UNTIL_ENDED = ("queued", "running", "paused")


def job_object(home: Home, job: Job) -> dict[str, Any]:
    """`FineTuningJob`."""
    view, facts = job_view(home, job), job.metadata
    hyperparameters = facts["hyperparameters"]
    running = view.state == "running" and bool(view.eta_seconds)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": facts["model"],
        "created_at": _seconds(job.created_at),
        "finished_at": _seconds(job.finished_at),
        "estimated_finish": _seconds(now() + timedelta(seconds=view.eta_seconds or 0)) if running else None,
        "status": _STATUS[view.state],
        "fine_tuned_model": fine_tuned_model(job) if view.state == "completed" else None,
        "organization_id": job.tenant,
        "training_file": facts["training_file"],
        "validation_file": facts["validation_file"],
        "result_files": _result_files(home, job),
        "trained_tokens": None if view.state in _UNTIL_ENDED else _trained_tokens(home, job),
        "hyperparameters": hyperparameters,
        "method": {"type": facts["method"], facts["method"]: {"hyperparameters": hyperparameters}},
        "seed": facts["seed"],
        "integrations": [],
        "error": _error(view),
        "metadata": facts["metadata"],
    }


def events_of(home: Home, job: Job) -> list[dict[str, Any]]:
    """What happened to a job, newest first."""
    created = f"The job was created, to train on {job.metadata['training_file']}."
    found = [_event(job, "created", job.created_at, created)]
    if job.started_at is not None:
        found.append(_event(job, "started", job.started_at, "A worker has begun with the job."))
    run = run_of(home, job)
    if run is not None:
        found += _events_of_run(job, run)
    if job.finished_at is not None:
        found.append(_last_event(job, job.finished_at))
    return [event for _, event in sorted(found, key=lambda pair: pair[0], reverse=True)]


def checkpoints_of(home: Home, job: Job) -> list[dict[str, Any]]:
    """The checkpoints of a job that became versions, and so can be asked; newest first."""
    registry, run = Registry(home), run_of(home, job)
    rows = {} if run is None else {row["step"]: row for row in read_rows(run.metrics_path)}
    found = []
    for alias, version_id in registry.aliases(job.full_name).items():
        step = step_of(alias)
        if step is not None:
            version = registry.resolve(f"{job.full_name}@{version_id}")
            found.append((step, _checkpoint(job, step, published_at(version), rows.get(step, {"step": step}))))
    return [checkpoint for _, checkpoint in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _checkpoint(job: Job, step: int, moment: datetime, row: Row) -> dict[str, Any]:
    # All of the held-out examples are looked at each time, so both kinds of figures are the same.
    loss, accuracy = _figure(row, "heldout_loss"), _figure(row, "heldout_token_accuracy")
    return {
        "id": f"ftckpt_{job.id.rpartition('-')[2]}-{step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": _seconds(moment),
        "fine_tuned_model_checkpoint": fine_tuned_checkpoint(job, step),
        "fine_tuning_job_id": job.id,
        "metrics": {
            "step": step,
            "train_loss": _figure(row, "loss"),
            "train_mean_token_accuracy": _figure(row, "token_accuracy"),
            "valid_loss": loss,
            "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": loss,
            "full_valid_mean_token_accuracy": accuracy,
        },
        "step_number": step,
    }


def run_of(home: Home, job: Job) -> Run | None:
    """The run of a job, once there is one and as long as it is kept."""
    run = None if job.run_id is None else RunStore(home).at(job.run_id)
    return run if run is not None and run.status_path.is_file() else None


def _events_of_run(job: Job, run: Run) -> Iterator[_Event]:
    total = tried(lambda: run.status.steps_total, None)
    none: list[dict[str, Any]] = []
    for row in read_rows(run.metrics_path):
        yield _step_event(job, row, total)
    for number, event in enumerate(tried(lambda: list(read_events(run.events_path)), none)):
        moment = datetime.fromisoformat(event["time"])
        match event["event"]:
            case "checkpoint":
                message = f"A checkpoint was saved at step {event['step']}."
                yield _event(job, f"checkpoint-{event['step']}-{number}", moment, message, step=event["step"])
            case "published":
                yield _event(job, f"published-{number}", moment, f"The model {fine_tuned_model(job)} was published.")
            case "cycle" if event["outcome"] != "failed":
                yield _event(job, f"gate-{number}", moment, f"{event['outcome']}: {event['detail']}")


def _step_event(job: Job, row: Row, total: int | None) -> _Event:
    figures = {
        "step": row["step"],
        "total_steps": total,
        "train_loss": _figure(row, "loss"),
        "train_mean_token_accuracy": _figure(row, "token_accuracy"),
        "valid_loss": _figure(row, "heldout_loss"),
        "valid_mean_token_accuracy": _figure(row, "heldout_token_accuracy"),
    }
    loss, heldout = figures["train_loss"], figures["valid_loss"]
    words = [f"training loss={loss:.4f}"] if loss is not None else []
    words += [f"validation loss={heldout:.4f}"] if heldout is not None else []
    message = f"Step {row['step']}/{total or '?'}: {', '.join(words) or 'no figures'}"
    moment = datetime.fromisoformat(row["time"])
    return _event(job, f"step-{row['step']}", moment, message, kind="metrics", **figures)


def _last_event(job: Job, moment: datetime) -> _Event:
    message, level = {
        "completed": (f"The job has succeeded. Ask for {fine_tuned_model(job)}.", "info"),
        "cancelled": ("The job was cancelled.", "warn"),
        "failed": (f"The job has failed: {job.error}", "error"),
    }[job.state]
    return _event(job, "finished", moment, message, level=level)


def _event(
    job: Job, what: str, moment: datetime, message: str, *, level: str = "info", kind: str = "message", **data: Any
) -> _Event:
    return moment, {
        "id": f"ftevent-{job.id.rpartition('-')[2]}-{what}",
        "object": "fine_tuning.job.event",
        "created_at": _seconds(moment),
        "level": level,
        "message": message,
        "type": kind,
        "data": data,
    }


def _result_files(home: Home, job: Job) -> list[str]:
    file_id = results_id(job.id)
    if job.state == "completed" and file_id is not None:
        with contextlib.suppress(NotFound):  # it was deleted
            return [FileStore(home, job.tenant).get(file_id).id]
    return []


def _trained_tokens(home: Home, job: Job) -> int | None:
    run = run_of(home, job)
    rows = [] if run is None else read_rows(run.metrics_path)
    return int(rows[-1]["tokens_trained_total"]) if rows and is_number(rows[-1].get("tokens_trained_total")) else None


def _error(view: JobView) -> dict[str, Any] | None:
    if view.state != "failed":
        return None
    return {"code": "training_failed", "message": view.error or view.detail or "It failed.", "param": None}


def _figure(row: Row, name: str) -> float | None:
    return row[name] if is_number(row.get(name)) else None


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.astimezone(UTC).timestamp())
