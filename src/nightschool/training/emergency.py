"""What is saved of a run that an error ends: the state after its last step, if that is still whole.

A step changes weights and moments in `update` alone. An error before or after it leaves the state of the last step as it
was, but for the random numbers that were drawn since, which are put back. An error in the middle of it leaves half of an
update, and that is never saved.

Several processes must all hold the same step whole. Each of them tells the others what it holds, its random state among it, and process 0 saves.
Where each has only a part of the weights, nothing is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from nightschool.errors import DiskFull, Interrupted, NonFiniteLoss
from nightschool.training.checkpoint import rng
from nightschool.training.distributed.last_words import CapturedRandomState, LastWords, any_failed
from nightschool.training.distributed.world import ALONE, World, said_of
from nightschool.training.metrics import say
from nightschool.training.state import Soundness, TrainState
from nightschool.training.task import Task

# Writes a checkpoint with the random states of all processes, and returns when it is on the disk.
Rescue = Callable[[TrainState, Sequence[CapturedRandomState]], None]

# What ends a run after saving, what says that the weights are not worth it, and a disk on which nothing finds room.
_NOT_RESCUED = (Interrupted, NonFiniteLoss, DiskFull)
# The others come to where they hear of it within a step; as long as three of them, and at least so long, they are waited for.
_LEAST_PATIENCE_SECONDS = 5.0
_PATIENCE_STEPS = 3


class Figures(Protocol):
    """The figures of the steps since a row was made."""

    def parts(self) -> list[Tensor]:
        """The parts of them that this process has."""
        ...

    def settle(self, others: Sequence[Sequence[float]] | None = None) -> None:
        """Take them into the state, with the parts of the others; raises NonFiniteLoss if one is none."""
        ...


def save_in_emergency(
    error: Exception,
    task: Task,
    state: TrainState,
    soundness: Soundness,
    figures: Figures,
    rescue: Rescue | None,
    world: World = ALONE,
) -> None:
    """Save what an error leaves, unless it ended the run after saving or says that the weights are not worth it; say what became of it.

    Args:
        error: What ends the run; whoever calls lets it go on.
        task: What learns.
        state: Where the run is.
        soundness: Told by whoever makes the steps.
        figures: Of the steps so far.
        rescue: Saves; None in a process that does not, and in all of them where each has a part of the weights.
        world: The processes that train together, all of which call this.
    """
    if world.size == 1:
        if rescue is not None and not isinstance(error, _NOT_RESCUED):
            what = f"{type(error).__name__} {_moment(state, whole=soundness.holds)}"
            _save(what, task, state, soundness, figures, rescue, {})
        return
    if isinstance(error, Interrupted):  # all of them
        return
    worth_it = soundness.holds and not isinstance(error, _NOT_RESCUED)
    world.leave(
        LastWords(
            world.rank,
            said_of(error),
            state.step if worth_it else None,
            rng.capture(soundness.random_state),
            [part.item() for part in figures.parts()],
        )
    )
    assert world.board is not None
    patience = max(_LEAST_PATIENCE_SECONDS, _PATIENCE_STEPS * state.seconds / max(1, state.step))
    if not world.is_first:
        if not task.is_sharded:  # or nothing is saved, and some wake only when this process has ended
            world.board.wait_until_closed(patience)
        return
    try:
        words = world.board.read(patience, any_failed if task.is_sharded else lambda _: False)
        _save_of_all(error, task, state, soundness, figures, rescue, words, world.size)
    finally:
        world.board.close()


def _save_of_all(
    error: Exception,
    task: Task,
    state: TrainState,
    soundness: Soundness,
    figures: Figures,
    rescue: Rescue | None,
    words: Mapping[int, LastWords],
    size: int,
) -> None:
    """In process 0: save if all processes hold this step, and say why not if one does not."""
    silent = [rank for rank in range(size) if rank not in words]
    causes = [f"process {one.rank} ended by {one.error.rstrip('.')}" for one in words.values() if one.error]
    ended = "; ".join(causes) or f"process {silent[0] if silent else '?'} is gone without a word"
    what = f"{ended[0].upper()}{ended[1:]} {_moment(state, whole=soundness.holds)}"
    if rescue is None:
        say(f"{what}. The processes share the weights among them, so the state is not saved. {_last(state)}")
    elif silent:
        say(f"{what}. What process {silent[0]} held is not known, so the state is not saved. {_last(state)}")
    elif isinstance(error, _NOT_RESCUED):
        return
    elif soundness.holds and (others := [one.rank for one in words.values() if one.step != state.step]):
        say(f"{what}. Process {others[0]} does not hold this step whole, so the state is not saved. {_last(state)}")
    else:
        _save(what, task, state, soundness, figures, rescue, words)


def _save(
    what: str,
    task: Task,
    state: TrainState,
    soundness: Soundness,
    figures: Figures,
    rescue: Rescue,
    words: Mapping[int, LastWords],
) -> None:
    """Save, if there is something whole and new; `words` are those of all processes, where there are several."""
    if not soundness.holds:
        say(f"{what}, so the state is not saved. {_last(state)}")
        return
    if state.saved_step == (state.step or None):
        say(f"{what}. {_last(state)}, and nothing was done since")
        return
    others = [one for rank, one in sorted(words.items()) if rank > 0]
    random_states = [rng.capture(soundness.random_state)]
    random_states += [one.random_state for one in others if one.random_state is not None]
    before = state.saved_at, state.saved_step
    try:
        task.discard_gradients()
        figures.settle([one.parts for one in others])
        state.saved_at, state.saved_step = state.seconds, state.step
        rescue(state, random_states)
    except Exception as second:
        state.saved_at, state.saved_step = before
        say(f"{what}, and its state could not be saved either: {second} {_last(state)}")
    else:
        say(f"{what}: its state is saved. Go on from it with --resume latest")


def _moment(state: TrainState, *, whole: bool) -> str:
    return f"after step {state.step}" if whole else f"in the middle of the update of step {state.step + 1}"


def _last(state: TrainState) -> str:
    if state.saved_step is None:
        return "There is no checkpoint"
    return f"The last checkpoint is that of step {state.saved_step}"
