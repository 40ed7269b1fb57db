"""A job as the training service's users know it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from nightschool.evaluation.verdict import GateReport
from nightschool.server.training_service.organisation import shown_base
from nightschool.server.training_service.parts import TrainingService
from nightschool.store.versions import Version
from nightschool.views.jobs import JobView
from nightschool.views.runs import tried

# What the service's users call the states that they do not know.
_STATES = {"paused": "queued", "interrupted": "failed"}
_FIGURES = (
    "step", "steps_total", "loss", "heldout_loss", "token_accuracy", "heldout_token_accuracy", "tokens_per_second",
    "eta_seconds", "run_id", "detail",
)  # fmt: skip


def job_status(training: TrainingService, job: JobView) -> dict[str, Any]:
    """`TrainingStatus` of a job."""
    figures = {name: getattr(job, name) for name in _FIGURES if getattr(job, name) is not None}
    return {
        "training_id": job.id,
        "org_id": job.tenant,
        "status": _STATES.get(job.state, job.state),
        "progress": 1.0 if job.state == "completed" else job.progress,
        "started_at": _naive(job.started_at),
        "completed_at": _naive(job.finished_at),
        "error": job.error,
        "metadata": {**job.metadata, "state": job.state, **figures, **_beside(job), **_model(training, job)},
    }


def _beside(job: JobView) -> dict[str, Any]:
    """The other jobs of the organisation that train on the same base at this moment, if any do."""
    return {"shares_base_with": list(job.shares_base_with)} if job.shares_base_with else {}


def _model(training: TrainingService, job: JobView) -> dict[str, Any]:
    """The version that a job made, and why it is served or not."""
    if job.candidate is None:
        return {}
    candidate = job.candidate
    version = tried(lambda: training.registry.resolve(candidate), None)
    gate = None if version is None else gate_of(training, version)
    return {"model_id": candidate.partition("@")[2], "outcome": job.outcome, "gate": gate}


def gate_of(training: TrainingService, version: Version) -> dict[str, Any] | None:
    """What the gate decided about a version, and each rule with its figures; None if it was never examined."""
    report = tried(lambda: GateReport.from_json(training.registry.load_report(version.name, version.id)), None)
    if report is None:
        return None
    keys = ("rule", "limit", "passed", "candidate", "champion", "why")
    return {
        "decision": report.decision,
        "compared_with": report.champion and shown_base(report.champion),
        "is_base": report.champion_is_base,
        "rules": [{key: value for key, value in rule.to_json().items() if key in keys} for rule in report.rules],
        "notes": list(report.notes),
    }


def _naive(moment: datetime | None) -> str | None:
    """ISO 8601 in UTC, without an offset."""
    return None if moment is None else moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
