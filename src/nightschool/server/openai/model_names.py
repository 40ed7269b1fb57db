"""Names of fine-tuned models as OpenAI writes them, `ft:BASE:ORGANISATION:SUFFIX:ID`, and as the registry has them.

A job publishes under a name of its own, `SUFFIX-ID`, so that each begins from its base; its champion is what the job made.
"""

from __future__ import annotations

import re

from nightschool.server.training_service.parts import TrainingService
from nightschool.store.checkpoint_permissions import FineTuned
from nightschool.store.checkpoints import alias_of
from nightschool.store.job_queue import Job
from nightschool.store.names import CHAMPION, full_name

SOURCE = "openai"
"""The `source` of jobs that came through OpenAI's API."""
_NO_SUFFIX = "ft"
_ID_DIGITS = 12
_MOST_SUFFIX_CHARACTERS = 40
_MOST_BASE_CHARACTERS = 64
_FINE_TUNED = re.compile(
    r"ft:(?P<base>.+):(?P<tenant>[^:]*):(?P<suffix>[a-z0-9-]*):(?P<id>[0-9a-f]{12})(:(?P<alias>ckpt-step-[0-9]{1,12}))?"
)


def name_of_job(job_id: str, suffix: str | None) -> str:
    """The bare name under which a job publishes: `SUFFIX-ID`."""
    return f"{_slug(suffix) or _NO_SUFFIX}-{_short(job_id)}"


def fine_tuned_model(job: Job) -> str:
    """What a job's model is called: `ft:BASE:ORGANISATION:SUFFIX:ID`."""
    base = str(job.metadata["model"])
    original = _FINE_TUNED.fullmatch(base)
    # Of a path, the last part: where models lie is nobody's business.
    shown = (
        original["base"] if original else base.rstrip("/").rpartition("/")[2].partition("@")[0][:_MOST_BASE_CHARACTERS]
    )
    return f"ft:{shown}:{job.tenant}:{_slug(job.metadata.get('suffix'))}:{_short(job.id)}"


def fine_tuned_checkpoint(job: Job, step: int) -> str:
    """What a checkpoint of a job is called: `ft:BASE:ORGANISATION:SUFFIX:ID:ckpt-step-N`."""
    return f"{fine_tuned_model(job)}:{alias_of(step)}"


def fine_tuned_models(training: TrainingService, tenant: str) -> dict[str, tuple[str]]:
    """What each version that a tenant's jobs have made is called, by its reference."""
    done = training.queue.ls(tenant=tenant, states=["completed"])
    return {job.candidate: (fine_tuned_model(job),) for job in done if job.source == SOURCE and job.candidate}


def fine_tuned(model: str) -> FineTuned | None:
    """What an `ft:…` of any tenant means; None for other names."""
    match = _FINE_TUNED.fullmatch(model)
    if match is None:
        return None
    return FineTuned(match["tenant"], f"{match['suffix'] or _NO_SUFFIX}-{match['id']}", match["alias"] or CHAMPION)


def registry_name(model: str, tenant: str) -> str:
    """What the registry calls a tenant's `ft:…`; any other name as it is."""
    meant = fine_tuned(model)
    if meant is None or meant.tenant != tenant:
        return model
    name = full_name(tenant, meant.name)
    return name if meant.pointer == CHAMPION else f"{name}@{meant.pointer}"


def _short(job_id: str) -> str:
    return job_id.rpartition("-")[2][:_ID_DIGITS]


def _slug(suffix: str | None) -> str:
    """A suffix in the letters that a name may have; others become dashes."""
    return re.sub(r"[^a-z0-9]+", "-", (suffix or "").lower())[:_MOST_SUFFIX_CHARACTERS].strip("-")
