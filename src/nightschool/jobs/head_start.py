"""What begins before a training ends, because it will be wanted then."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from nightschool.errors import NightschoolError
from nightschool.jobs.launch import CycleContext
from nightschool.store.runs import Run
from nightschool.views.metrics_rows import RowsFollower
from nightschool.views.runs import FAR_SECONDS, NEAR_SECONDS, seconds_left

LOOK_SECONDS = 0.5


class HeadStart(ABC):
    """Follows how far off the end of a run is; a subclass says what to do when it is near, and when it is far again."""

    def __init__(self, run: Run, around: CycleContext) -> None:
        self._run = run
        self._around = around
        self._rows = RowsFollower(run.metrics_path)
        self._looked_at = 0.0
        self._is_given_up = False

    def look(self) -> None:
        """Begin, or leave it, as far off as the end of the training is. Called again and again while it goes on."""
        moment = time.monotonic()
        if self._is_given_up or moment - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = moment
        try:
            left = seconds_left(self._rows.update(), self._run.status.steps_total)
            if left is None or left < NEAR_SECONDS:
                self._near()
            elif left > FAR_SECONDS:
                self._far()
        except (NightschoolError, OSError) as error:  # the training is worth more than a head start
            self._around.say(f"The gate will begin when it is needed: {error}")
            self._is_given_up = True

    @abstractmethod
    def _near(self) -> None:
        """Begin, unless it has begun."""

    @abstractmethod
    def _far(self) -> None:
        """Leave it, if it has begun."""
