"""What a night took: its settings, and what its spot checks found by step. From this a refusal is explained."""

from __future__ import annotations

from dataclasses import dataclass

from nightschool.evaluation.scores import Plain
from nightschool.evaluation.spot_check import SpotCheck


@dataclass(frozen=True)
class Effort(Plain):
    """How a run was trained. Without a run, that of a recipe which leaves all of it open.

    `step` is that of the weights that were published, of `steps_total` that were planned. `wordings` are the trained ones a fact,
    a mean; `rehearsed` are answers per example, 0 where nothing is rehearsed. `studies` says whether this method has both.
    `passing` says which two figures a spot check needed.
    """

    checks: tuple[SpotCheck, ...] = ()
    step: int | None = None
    steps_total: int | None = None
    epochs: int = 5
    max_steps: int | None = None
    learning_rate: float = 0.0
    replay_ratio: float = 1.0
    wordings: float = 1.0
    rehearsed: float = 0.0
    studies: bool = True
    adapter: bool = False
    passing: str = ""
