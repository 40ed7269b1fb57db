"""What a cycle leaves: its result for whoever began it, and its facts for whoever goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nightschool.errors import Interrupted, NotFound
from nightschool.events import read_events
from nightschool.store.atomic import write_json
from nightschool.store.runs import Run

Trigger = Literal["manual", "start", "due", "catch_up", "resume"]
Outcome = Literal["promoted", "published", "refused", "skipped", "failed", "interrupted"]

EXIT_CODES: Mapping[Outcome, int] = {
    "promoted": 0,
    "published": 0,
    "skipped": 0,
    "refused": 3,
    "failed": 1,
    "interrupted": Interrupted.exit_code,
}


@dataclass(frozen=True)
class CycleResult:
    """How a cycle ended.

    `published`: there is a candidate, and the recipe or a pinned champion kept it from being promoted.
    `data_fingerprint` covers all that the outcome depends on: new examples, starting weights and recipe.
    `was_killed`: it failed because a signal killed one of its processes, so that it may go on where that one was.
    `report` is the gate's, as JSON. `champion` is the reference that was the champion when the cycle ended.
    """

    outcome: Outcome
    detail: str
    run_id: str | None = None
    candidate: str | None = None
    champion: str | None = None
    report: dict[str, Any] | None = None
    data_fingerprint: str | None = None
    failed_exit_code: int = 1
    was_killed: bool = False

    @property
    def exit_code(self) -> int:
        """What `nightschool train` exits with."""
        return self.failed_exit_code if self.outcome == "failed" else EXIT_CODES[self.outcome]

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("failed_exit_code", "was_killed")}


@dataclass(frozen=True)
class CycleRecord:
    """What one stage of a cycle leaves for the next, in `cycle.json`.

    `recipe_base` and `recipe_shape` are those of the recipe that was given; the run's own begins with the champion. Older records
    have no shape.
    """

    trigger: str
    root: str
    recipe_base: str
    champion: str | None
    data_fingerprint: str
    num_new_examples: int
    recipe_shape: dict[str, Any] | None = None

    @staticmethod
    def path(run: Run) -> Path:
        return run.cycle_path

    @classmethod
    def read(cls, run: Run) -> CycleRecord:
        """The facts of a run that a cycle created.

        Raises:
            NotFound: If the run was not created by a cycle.
        """
        path = cls.path(run)
        if not path.exists():
            raise NotFound(
                f"The run {run.id} has no cycle.json, so no cycle began it. Start a new one from its recipe."
            )
        return cls(**json.loads(path.read_text("utf-8")))

    def write(self, run: Run) -> None:
        write_json(self.path(run), vars(self))


def root_of(run: Run) -> Path:
    """Where relative paths of its recipe begin: where its cycle was begun; here, if no cycle began it."""
    return Path(CycleRecord.read(run).root) if CycleRecord.path(run).exists() else Path.cwd()


def verdict_of(run: Run) -> CycleResult | None:
    """How the cycle of a run ended, from the run's own events; None if it was interrupted, or killed before it ended."""
    ends = [row for row in read_events(run.events_path) if row["event"] == "cycle"]
    if not ends or ends[-1]["outcome"] == "interrupted":
        return None
    return CycleResult(
        ends[-1]["outcome"],
        ends[-1]["detail"],
        run_id=run.id,
        candidate=run.status.candidate,
        data_fingerprint=CycleRecord.read(run).data_fingerprint,
    )
