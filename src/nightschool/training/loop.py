"""The one training loop. Each turn: evaluate, save, stop?, step, log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nightschool.data.batches import Batch
from nightschool.errors import Interrupted, NonFiniteLoss, NothingToTrain
from nightschool.evaluation.spot_check import SpotCheck
from nightschool.store.checkpoints import Reason
from nightschool.training.distributed.world import ALONE, World
from nightschool.training.emergency import Rescue, save_in_emergency
from nightschool.training.metrics import MetricsLog, peak_bytes
from nightschool.training.optimizer import Schedule
from nightschool.training.state import Budget, Interval, Soundness, TrainState
from nightschool.training.task import Task
from nightschool.work.stop import Stop

# As `Task.accumulate`, told which task.
Accumulate = Callable[[Task, Sequence[Batch], int, torch.amp.GradScaler | None], Tensor]


@dataclass(frozen=True)
class StepOutcome:
    """What one update did; the tensors are still on the device, and nobody has waited for them.

    `loss` and `figures` are this process's part of them, means over `loss_units`.
    """

    step: int
    epoch: int
    where: str
    tokens_trained: int
    loss_units: int
    learning_rate: float
    loss: Tensor
    grad_norm: Tensor
    figures: Mapping[str, Tensor]


def fit(
    task: Task,
    state: TrainState,
    budget: Budget,
    *,
    schedule: Schedule,
    metrics: MetricsLog | None,
    evaluate: Callable[[], float] | None = None,
    spot_check: Callable[[int], SpotCheck] | None = None,
    save: Callable[[TrainState, Reason], None] | None = None,
    rescue: Rescue | None = None,
    stop: Stop | None = None,
    last_step: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    describe: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    world: World = ALONE,
    accumulate: Accumulate | None = None,
) -> TrainState:
    """Train until `budget.steps_total` updates are done, from wherever `state` is.

    Args:
        task: What learns.
        state: Where the run is; it is changed in place and returned.
        budget: How long, and how often.
        schedule: The learning rate of each step.
        metrics: Where rows go; None in a process that writes nothing.
        evaluate: Returns the held-out loss in nats per token; it must leave the random state as it was.
        spot_check: Returns what the model has learned by a step, and its drift; as `evaluate`, it leaves all as it was.
        save: Writes a checkpoint, and is told why.
        rescue: Writes one when an error ends the run, if the state is whole.
        stop: Asked once per turn; when it is requested, the state is saved and `Interrupted` is raised.
        last_step: After this step as well, in whichever process knows of it.
        scaler: The gradient scaler of fp16.
        on_row: Also gets each row of metrics.
        describe: Figures of the method for a row, added to it.
        world: The processes that train together. All of them call `evaluate`, `spot_check` and `save`, at the same steps.
        accumulate: Finds the gradients of a window in place of the task, whose own way it may take.

    Raises:
        Interrupted: After saving, because `stop` was set.
        NonFiniteLoss: If a loss or a gradient is NaN or infinite; nothing was saved after it.
        NothingToTrain: If no token of an accumulation window carries loss.
    """
    log = _Log(task, state, metrics, on_row, describe, overflow_is_handled=scaler is not None, world=world)
    soundness = Soundness()
    task.model.train()
    try:
        while True:
            finished = budget.is_used_up(state)
            # Clocks and signals differ between processes, so they agree on what is due.
            stopping, evaluation_due, check_due, save_due = world.any(
                (stop is not None and stop.requested) or state.step == last_step,
                evaluate is not None and state.evaluation_due(budget.evaluate_every, finished=finished),
                spot_check is not None and state.check_due(budget.check_every, finished=finished),
                save is not None
                and state.save_due(budget.save_every, finished=finished, each_epoch=budget.save_each_epoch),
            )
            if evaluate is not None and evaluation_due:
                _take_heldout_loss(state, log, evaluate)
            finished = budget.is_used_up(state)
            if spot_check is not None and (check_due or (finished and state.check_due(None, finished=True))):
                _take_spot_check(state, log, spot_check)
                finished = budget.is_used_up(state)
                if evaluate is not None and finished and state.evaluation_due(None, finished=True):
                    _take_heldout_loss(state, log, evaluate)
            if evaluation_due or check_due:
                # What is best so far is what will be published, so it has to be there.
                wanted = finished or budget.is_best(state)
                save_due = save_due or (save is not None and wanted and state.save_due(None, finished=True))
            log.write()

            if save is not None and (save_due or (stopping and state.save_due(None, finished=True))):
                log.settle()
                _save(state, save, _reason(state, budget, finished=finished, stopping=stopping))

            if finished:
                return state
            if stopping:
                reason = (
                    "The end of the steps that were asked for"
                    if state.step == last_step
                    else "A signal to another process"
                )
                reason = stop.reason if stop is not None and stop.reason else reason
                raise Interrupted(
                    f"{reason} stopped the run after step {state.step} of {budget.steps_total}. "
                    "Continue it with --resume latest."
                )

            started = time.perf_counter()
            window = _next_window(task, state, budget.accumulation_steps)
            tokens_trained, tokens_consumed, units = world.sums(
                sum(batch.tokens_trained for batch in window),
                sum(batch.tokens_consumed for batch in window),
                sum(batch.loss_units for batch in window),
            )
            rate = schedule.rate(state.step)
            loss = _gradients(task, state, window, (tokens_trained, units), scaler, accumulate)
            with soundness.updating():
                outcome = _update(task, state, loss, (tokens_trained, units), budget.max_grad_norm, rate, scaler, world)
                _advance(task, state, len(window), tokens_trained, tokens_consumed)

            log.collect(outcome, time.perf_counter() - started)
            if state.step % budget.log_every == 0 or state.step == budget.steps_total:
                log.settle()
                log.make_row()
    except Exception as error:
        if rescue is not None or world.size > 1:
            save_in_emergency(error, task, state, soundness, log, rescue, world)
        raise


def _take_heldout_loss(state: TrainState, log: _Log, evaluate: Callable[[], float]) -> None:
    log.settle()
    started = time.perf_counter()
    state.heldout_history.append(evaluate())
    state.heldout_steps.append(state.step)
    state.evaluated_at = state.seconds
    log.add({"heldout_loss": state.heldout_history[-1], "heldout_seconds": time.perf_counter() - started})


def _take_spot_check(state: TrainState, log: _Log, spot_check: Callable[[int], SpotCheck]) -> None:
    log.settle()
    started = time.perf_counter()
    check = spot_check(state.step)
    if check.drift is not None and not math.isfinite(check.drift):
        raise NonFiniteLoss(
            f"The drift is {check.drift} after step {state.step}: the weights are broken. {_last_good(state)}; lower train.learning_rate."
        )
    state.add_spot_check(check)
    drifted = {} if check.drift is None else {"drift": check.drift}
    log.add({"learned": check.learned, **drifted, "check_seconds": time.perf_counter() - started})


def _reason(state: TrainState, budget: Budget, *, finished: bool, stopping: bool) -> Reason:
    """Why a checkpoint is saved now."""
    if finished or stopping:
        return "final" if finished else "interrupted"
    if state.batch_index == 0 and (
        budget.save_each_epoch or budget.save_every is None or budget.save_every.unit == "epochs"
    ):
        return "epoch"
    return "interval" if state.save_due(budget.save_every, finished=False) else "best"


def _save(state: TrainState, save: Callable[[TrainState, Reason], None], reason: Reason) -> None:
    """Save, with the checkpoint as the last one in what it says of itself."""
    before = state.saved_at, state.saved_step
    state.saved_at, state.saved_step = state.seconds, state.step
    try:
        save(state, reason)
    except BaseException:
        state.saved_at, state.saved_step = before
        raise


def _next_window(task: Task, state: TrainState, accumulation_steps: int) -> list[Batch]:
    """The micro-batches of one update; a window never crosses the end of an epoch, so its last one may be short."""
    end = min(state.batch_index + accumulation_steps * task.stride, task.epoch_length(state.epoch))
    return [task.batch(state.epoch, place) for place in range(state.batch_index, end, task.stride)]


def steps_in_epoch(epoch_length: int, accumulation_steps: int, stride: int = 1) -> int:
    """How many updates an epoch of so many places has."""
    return math.ceil(epoch_length / (accumulation_steps * stride))


def _gradients(
    task: Task,
    state: TrainState,
    window: list[Batch],
    tokens_and_units: tuple[int, int],
    scaler: torch.amp.GradScaler | None,
    accumulate: Accumulate | None,
) -> Tensor:
    """Find the gradients of a window. The loss is the sum over all of it ÷ its loss units, of all processes."""
    tokens_trained, units = tokens_and_units
    if tokens_trained == 0:
        raise NothingToTrain(
            f"No token carries loss in step {state.step + 1} ({task.where(state.epoch, state.batch_index)}). "
            "Look at the loss mask in `nightschool plan`: an assistant turn must be there and must fit max_seq_len."
        )
    if accumulate is None:
        return task.accumulate(window, units, scaler)
    return accumulate(task, window, units, scaler)


def _update(
    task: Task,
    state: TrainState,
    loss: Tensor,
    tokens_and_units: tuple[int, int],
    max_grad_norm: float,
    learning_rate: float,
    scaler: torch.amp.GradScaler | None,
    world: World,
) -> StepOutcome:
    """One update, with the gradients that are there."""
    tokens_trained, units = tokens_and_units
    grad_norm = task.update(learning_rate, max_grad_norm, scaler, world)
    return StepOutcome(
        step=state.step + 1,
        epoch=state.epoch,
        where=task.where(state.epoch, state.batch_index),
        tokens_trained=tokens_trained,
        loss_units=units,
        learning_rate=learning_rate,
        loss=loss,
        grad_norm=grad_norm,
        figures=task.figures(),
    )


def _advance(task: Task, state: TrainState, num_batches: int, tokens_trained: int, tokens_consumed: int) -> None:
    state.step += 1
    state.batch_index += num_batches * task.stride
    state.tokens_consumed += tokens_consumed
    state.tokens_trained += tokens_trained
    if state.batch_index >= task.epoch_length(state.epoch):
        state.epoch, state.batch_index = state.epoch + 1, 0


def _last_good(state: TrainState) -> str:
    saved = state.saved_step
    return f"The last good checkpoint is the one of step {saved}" if saved else "There is no checkpoint yet"


class _Log:
    """Collects outcomes without waiting for the device, and turns them into rows when somebody asks."""

    def __init__(
        self,
        task: Task,
        state: TrainState,
        metrics: MetricsLog | None,
        on_row: Callable[[dict[str, Any]], None] | None,
        describe: Callable[[dict[str, Any]], dict[str, Any]] | None,
        *,
        overflow_is_handled: bool,
        world: World,
    ) -> None:
        self._state, self._metrics, self._on_row, self._describe = state, metrics, on_row, describe
        self._overflow_is_handled = overflow_is_handled
        self._device, self._world = task.device, world
        self._unsettled: list[StepOutcome] = []
        self._last: StepOutcome | None = None
        self._last_norm = 0.0
        self._row: dict[str, Any] | None = None

    def collect(self, outcome: StepOutcome, seconds: float) -> None:
        self._unsettled.append(outcome)
        self._state.seconds += seconds
        self._state.interval.seconds += seconds

    def parts(self) -> list[Tensor]:
        """What this process has of the figures of the steps since the last time, which are sums over all processes."""
        figures = (part for outcome in self._unsettled for part in outcome.figures.values())
        return [part.clone() for part in (*(outcome.loss for outcome in self._unsettled), *figures)]

    def settle(self, others: Sequence[Sequence[float]] | None = None) -> None:
        """Fetch the figures of the steps since the last time.

        Args:
            others: The parts of all other processes, where these cannot be asked.

        Raises:
            NonFiniteLoss: With the first step whose loss or gradient norm is NaN or infinite.
        """
        waited_from = time.perf_counter()
        interval = self._state.interval
        parts = self.parts()
        if others is None:
            self._world.add_up(parts)  # all processes settle after the same steps
        for part, *theirs in zip(parts, *(others or ()), strict=True):
            part += sum(theirs)
        sums = [part.item() for part in parts]
        figures = iter(sums[len(self._unsettled) :])
        for outcome, loss in zip(self._unsettled, sums, strict=False):
            norm = outcome.grad_norm.item()
            self._refuse_non_finite(outcome, loss, norm)
            interval.steps += 1
            interval.tokens_trained += outcome.tokens_trained
            interval.loss_units += outcome.loss_units
            interval.loss_sum_nats += loss * outcome.loss_units
            for name, mean in zip(outcome.figures, figures, strict=False):
                interval.figure_sums[name] = interval.figure_sums.get(name, 0.0) + mean * outcome.loss_units
            self._last, self._last_norm = outcome, norm
        self._unsettled.clear()
        waited = time.perf_counter() - waited_from
        interval.seconds += waited
        self._state.seconds += waited

    def _refuse_non_finite(self, outcome: StepOutcome, loss: float, norm: float) -> None:
        # fp16 overflows now and then; its scaler skipped that update and lowered the scale.
        if math.isfinite(loss) and (math.isfinite(norm) or self._overflow_is_handled):
            return
        what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
        raise NonFiniteLoss(
            f"The {what} became {value} in step {outcome.step} "
            f"({outcome.where}). {_last_good(self._state)}; lower train.learning_rate, or look at the data there."
        )

    def make_row(self) -> None:
        """Make the row of this step out of the interval, and begin a new interval."""
        interval, last, state = self._state.interval, self._last, self._state
        assert last is not None, "a row needs a settled step"
        loss = interval.loss_sum_nats / interval.loss_units
        state.loss_steps.append(state.step)
        state.loss_history.append(loss)
        state.learning_rates.append(last.learning_rate)
        self._row = {
            "step": state.step,
            "epoch": last.epoch,
            "loss": loss,
            "tokens_per_second": interval.tokens_trained / max(interval.seconds, 1e-9),
            "tokens_trained": interval.tokens_trained,
            "tokens_trained_total": state.tokens_trained,
            "learning_rate": last.learning_rate,
            "grad_norm": self._last_norm if math.isfinite(self._last_norm) else None,
            "peak_bytes": peak_bytes(self._device),
            "seconds": state.seconds,
            **{name: total / interval.loss_units for name, total in interval.figure_sums.items()},
        }
        state.interval = Interval()

    def add(self, figures: Mapping[str, float]) -> None:
        """Add what was measured to the row of this step; step 0 has no row of metrics."""
        if self._row is None and self._last is not None and self._state.interval.steps > 0:
            self.make_row()
        if self._row is not None:
            self._row |= figures

    def write(self) -> None:
        """Write the row of this step, if there is one."""
        if self._row is not None:
            if self._describe is not None:
                self._row |= self._describe(self._row)
            if self._metrics is not None:
                self._metrics.write(self._row)
            if self._on_row is not None:
                self._on_row(self._row)
            self._row = None
