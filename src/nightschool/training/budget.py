"""How long a run is, how often it looks up, and what it takes for the end or for the best."""

from __future__ import annotations

from dataclasses import dataclass, field

from nightschool.evaluation.spot_check import Limits, best_of, checks_in_vain
from nightschool.training.state import TrainState
from nightschool.units import Every


@dataclass(frozen=True)
class Budget:
    """How long a run is, and how often it looks up. A rhythm of None is once per epoch; `save_each_epoch` adds that to another.

    With `patience`, it ends after so many held-out losses that were not lower than the best by more than `min_delta`, or, where
    it is spot-checked, after so many spot checks that were no better. With `enough`, it ends after a spot check that shows this. Of spot checks that are `good`, the best one's weights are kept.
    """

    steps_total: int
    accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    log_every: int = 1
    evaluate_every: Every | None = None
    save_every: Every | None = None
    save_each_epoch: bool = False
    patience: int | None = None
    min_delta: float = 0.0
    check_every: Every | None = None
    enough: Limits | None = None
    good: Limits = field(default_factory=Limits)

    @property
    def saves_before_its_end(self) -> bool:
        """Whether there is a save before the last one, so that it is worth while to make memory for copies ready."""
        every = self.save_every
        if self.patience is not None or self.enough is not None or self.save_each_epoch:
            return True
        return every is None or every.unit != "steps" or every.amount < self.steps_total

    def is_used_up(self, state: TrainState) -> bool:
        """Whether the run ends here: no step is left, what it looks at gets no better, or a spot check showed enough."""
        return state.step >= self.steps_total or self.is_in_vain(state) or self.knows_enough(state)

    def is_in_vain(self, state: TrainState) -> bool:
        """Whether as many spot checks as patience lasts were in vain, or, where there are none, as many held-out losses."""
        if self.patience is None:
            return False
        if self.enough is not None:
            return checks_in_vain(state.spot_checks, self.enough) >= self.patience
        return state.evaluations_in_vain(self.min_delta) >= self.patience

    def knows_enough(self, state: TrainState) -> bool:
        """Whether the last spot check showed enough."""
        checks = state.spot_checks[-1:]
        return self.enough is not None and any(map(self.enough.hold, checks))

    def merit(self, state: TrainState) -> tuple[float, ...]:
        """How good the spot check of this very step found these weights; empty if there was none, or if it did not pass."""
        checks = [check for check in state.spot_checks[-1:] if check.step == state.step]
        return self.good.merit(checks[0]) if checks else ()

    def is_best(self, state: TrainState) -> bool:
        """Whether these weights are the best so far by what this run looks at, so that they may be published."""
        by_loss = self.patience is not None and state.best_heldout == (state.step, state.heldout_loss)
        best = None if self.enough is None else best_of(state.spot_checks, self.good)
        return by_loss or (best is not None and best.step == state.step)
