"""What the routes of the training service need besides what every route has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from nightschool.config.training_service import TrainingServiceSettings
from nightschool.server.errors import Refusal
from nightschool.server.training_service.children import Children
from nightschool.store.home import Home
from nightschool.store.job_queue import JobQueue
from nightschool.store.registry import Registry


@dataclass(frozen=True)
class TrainingService:
    """The jobs and models of all organisations of a home.

    `chosen` holds the version that an organisation loaded by its id, which answers until another is loaded.
    """

    registry: Registry
    queue: JobQueue
    settings: TrainingServiceSettings
    children: Children = field(default_factory=Children)
    chosen: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, registry: Registry, settings: TrainingServiceSettings) -> TrainingService:
        """The service of a home. Its database is opened when somebody asks for a job."""
        return cls(registry, JobQueue(registry.home.database), settings)

    @property
    def home(self) -> Home:
        return self.registry.home


def _training(request: Request) -> TrainingService:
    training = request.app.state.training
    if training is None:
        raise Refusal(404, "This server has no home, so it trains nothing. Start it on a home directory.", "no_home")
    assert isinstance(training, TrainingService)
    return training


TrainingOf = Annotated[TrainingService, Depends(_training)]
