"""All routes of the training service, under the paths that its users know."""

from __future__ import annotations

from nightschool.server.training_service import evaluation, index, jobs, models

ROUTERS = (jobs.router, evaluation.router, models.router, index.router)

BRING_CONVERSATIONS = ("/api/v1/training/start", "/api/v1/training/preview")
