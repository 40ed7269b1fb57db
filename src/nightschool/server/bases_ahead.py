"""Has the base of a job in memory before its adapter is asked for the first time.

Who trains an adapter wants to talk to it as soon as it is promoted, and loading its base is most of what the first answer
takes. So a server that serves whatever its home has looks at the jobs that are trained there, and loads a base when the end
of a training is near, as the gate's process does. An idle base is let go again some time after.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from nightschool.config.recipe import ADAPTER_METHODS, Recipe
from nightschool.engine.capacity import free_bytes
from nightschool.engine.pool import BoundEngine, EnginePool
from nightschool.models.stored import stored_weights
from nightschool.store.job_queue import Job, JobQueue
from nightschool.store.runs import Run, RunStore
from nightschool.views.metrics_rows import RowsFollower
from nightschool.views.runs import FAR_SECONDS, NEAR_SECONDS, seconds_left

log = logging.getLogger("nightschool.server.bases_ahead")

_LOOK_SECONDS = 1.0
# So many times a base must be free: it is trained and asked beside, and nothing that is asked for now may want for room.
_ROOM = 4
# Bases at most; more jobs than that have waited for others before.
_MOST = 2
# After a job has left the queue's hands: as long as somebody may take to ask its adapter something.
_KEPT_SECONDS = 60.0


@dataclass
class _Watched:
    """One job while it runs, and a while after. `base` is held if it was loaded; `ended_at` by the monotonic clock."""

    rows: RowsFollower
    base: BoundEngine | None = None
    is_given_up: bool = False
    ended_at: float | None = None
    run: Run = field(kw_only=True)


class BasesAhead:
    """Looks at the jobs once a second, on a thread of its own. One that cannot be looked at is loaded when it is asked for."""

    def __init__(self, pool: EnginePool, queue: JobQueue) -> None:
        self._pool = pool
        self._queue = queue
        self._watched: dict[str, _Watched] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bases-ahead", daemon=True)

    def start(self) -> BasesAhead:
        """Begin. Returns itself."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End after what is being loaded, and let all go."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        for job_id in list(self._watched):
            self._forget(job_id)

    def look(self) -> None:
        """Load what will be wanted soon, and let go what was wanted long ago."""
        running = {job.id: job for job in self._queue.ls(states=("running",)) if job.run_id is not None}
        for job in running.values():
            if job.recipe.get("method") in ADAPTER_METHODS:
                self._look_at(job)
        for job_id, watched in list(self._watched.items()):
            if job_id not in running:
                watched.ended_at = watched.ended_at or time.monotonic()
                if time.monotonic() - watched.ended_at > _KEPT_SECONDS or watched.base is None:
                    self._forget(job_id)

    def _look_at(self, job: Job) -> None:
        watched = self._watched.get(job.id)
        if watched is None:
            assert job.run_id is not None, "only those are looked at"
            run = RunStore(self._queue.home).get(job.run_id)
            watched = self._watched[job.id] = _Watched(RowsFollower(run.metrics_path), run=run)
        if watched.is_given_up:
            return
        left = seconds_left(watched.rows.update(), watched.run.status.steps_total)
        if watched.base is not None:
            if left is not None and left > FAR_SECONDS:
                self._forget(job.id)
        elif (left is None or left < NEAR_SECONDS) and sum(
            one.base is not None for one in self._watched.values()
        ) < _MOST:
            try:
                watched.base = self._loaded(watched.run, Path(job.root))
            except Exception as error:  # whoever asks for it hears what is wrong
                facts = {"job": job.id, "error": str(error)}
                log.warning("a base is not loaded before it is asked for", extra={"facts": facts})
            watched.is_given_up = watched.base is None

    def _loaded(self, run: Run, root: Path) -> BoundEngine | None:
        """The base of a run, warm; None if there is too little room beside others."""
        base = Recipe.model_validate(run.recipe()).base
        stored = stored_weights(base, self._queue.home, root)
        if free_bytes(self._pool.device) < _ROOM * stored.loaded_bytes(self._pool.dtype):
            return None
        return self._pool.open_base(base, root=root)

    def _forget(self, job_id: str) -> None:
        watched = self._watched.pop(job_id)
        if watched.base is not None:
            self._pool.close(watched.base)

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            try:
                self.look()
            except Exception as error:  # a database that is away comes back, and a run that was removed is gone
                log.warning("jobs cannot be looked at", extra={"facts": {"error": str(error)}})
