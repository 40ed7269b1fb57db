"""Where a run stands, in plain numbers that survive a restart, and whether that is whole now; and how far it goes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nightschool.errors import StateMismatch
from nightschool.evaluation.spot_check import Limits, SpotCheck, best_of, checks_in_vain
from nightschool.training.checkpoint import rng
from nightschool.training.distributed.world import OthersGone
from nightschool.units import Every


@dataclass
class Interval:
    """What happened since the last row of metrics; saved, so that a resumed run writes the same rows.

    `loss_units` are those that the losses are means over: tokens trained, or pairs. `figure_sums` are sums over them of what
    the task tells besides.
    """

    steps: int = 0
    tokens_trained: int = 0
    loss_sum_nats: float = 0.0
    seconds: float = 0.0
    loss_units: int = 0
    figure_sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Interval:
        """Read one that was saved; before there were pairs, tokens alone were counted."""
        return cls(**({"loss_units": plain["tokens_trained"]} | plain))


@dataclass
class TrainState:
    """Where a run is.

    `step` counts finished updates. `epoch`, `batch_index` and `tokens_consumed` are the position of the next
    micro-batch (`batch_index` is a place in the epoch, in what the task counts in, and 0 exactly at its start). `tokens_trained` counts tokens that carried
    loss. Losses are nats per token trained. `seconds` counts training time of all processes of this run.
    """

    fingerprint: str
    step: int = 0
    epoch: int = 0
    batch_index: int = 0
    tokens_consumed: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0
    loss_steps: list[int] = field(default_factory=list)
    loss_history: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    heldout_steps: list[int] = field(default_factory=list)
    heldout_history: list[float] = field(default_factory=list)
    evaluated_at: float = 0.0
    check_steps: list[int] = field(default_factory=list)
    learned_history: list[float] = field(default_factory=list)
    drift_history: list[float | None] = field(default_factory=list)
    checked_at: float = 0.0
    saved_at: float = 0.0
    saved_step: int | None = None
    interval: Interval = field(default_factory=Interval)

    @property
    def current_loss(self) -> float | None:
        """The last logged training loss."""
        return self.loss_history[-1] if self.loss_history else None

    @property
    def best_loss(self) -> float | None:
        """The lowest logged training loss."""
        return min(self.loss_history, default=None)

    @property
    def heldout_loss(self) -> float | None:
        """The held-out loss at this very step, or None if it was not taken here."""
        return self.heldout_history[-1] if self.heldout_steps and self.heldout_steps[-1] == self.step else None

    @property
    def best_heldout(self) -> tuple[int, float] | None:
        """Step and value of the lowest held-out loss after training began; the earliest of equals."""
        taken = [(loss, step) for step, loss in zip(self.heldout_steps, self.heldout_history, strict=True) if step > 0]
        return (min(taken)[1], min(taken)[0]) if taken else None

    @property
    def spot_checks(self) -> list[SpotCheck]:
        """Those so far, in the order of their steps."""
        return list(map(SpotCheck, self.check_steps, self.learned_history, self.drift_history))

    def add_spot_check(self, check: SpotCheck) -> None:
        """Add the one of this very step."""
        self.check_steps.append(check.step)
        self.learned_history.append(check.learned)
        self.drift_history.append(check.drift)
        self.checked_at = self.seconds

    def evaluations_in_vain(self, min_delta: float) -> int:
        """Held-out losses since the last that was lower than the best before it by more than `min_delta`.

        The one before training counts as the first best.
        """
        best, in_vain = math.inf, 0
        for loss in self.heldout_history:
            in_vain = 0 if loss < best - min_delta else in_vain + 1
            best = min(best, loss)
        return in_vain

    def evaluation_due(self, every: Every | None, *, finished: bool) -> bool:
        """Say whether the held-out loss is taken now; once at the start and once at the end in any case."""
        if self.heldout_steps and self.heldout_steps[-1] == self.step:
            return False
        return self.step == 0 or finished or self._due(every, self.evaluated_at)

    def check_due(self, every: Every | None, *, finished: bool) -> bool:
        """Say whether the model is spot-checked now; once at the end in any case, and never before training."""
        if self.step == 0 or self.step in self.check_steps[-1:]:
            return False
        return finished or self._due(every, self.checked_at)

    def save_due(self, every: Every | None, *, finished: bool, each_epoch: bool = False) -> bool:
        """Say whether a checkpoint is written now; at the end in any case, never twice for one step."""
        if self.step == 0 or self.saved_step == self.step:
            return False
        return finished or (each_epoch and self.batch_index == 0) or self._due(every, self.saved_at)

    def _due(self, every: Every | None, last_at: float) -> bool:
        every = every or Every(1, "epochs")
        if every.unit == "seconds":
            return self.seconds - last_at >= every.amount
        if every.unit == "epochs":
            return self.batch_index == 0 and self.epoch % int(every.amount) == 0
        return self.step % int(every.amount) == 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> TrainState:
        """Read what `to_json` wrote.

        Raises:
            StateMismatch: If a field is missing or unknown.
        """
        known = {f.name for f in fields(cls)}
        if "check_steps" not in plain:  # saved before there were spot checks
            plain = plain | {"check_steps": [], "learned_history": [], "drift_history": [], "checked_at": 0.0}
        if plain.keys() != known:
            raise StateMismatch(
                f"state.json lacks {sorted(known - plain.keys())} and has the unknown {sorted(plain.keys() - known)}. "
                "Resume with the version of nightschool that saved the checkpoint."
            )
        return cls(**(plain | {"interval": Interval.from_json(plain["interval"])}))


class Soundness:
    """Whether what a run holds is the state after its last step, and which random state goes with it."""

    def __init__(self) -> None:
        self._is_updating = False
        self._random_state = rng.take()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around what changes the state. Whatever draws random numbers afterwards belongs to the next step.

        What processes do together in an update they do before it changes anything, so that one that is gone leaves the others whole.
        """
        self._is_updating = True
        try:
            yield
        except OthersGone:
            self._is_updating = False
            raise
        self._is_updating = False
        self._random_state = rng.take()

    @property
    def holds(self) -> bool:
        return not self._is_updating

    @property
    def random_state(self) -> rng.RandomState:
        """The one after the last step."""
        return self._random_state


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
