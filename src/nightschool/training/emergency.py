"""What is saved of a run that an error ends: the state after its last step, if that is still whole.

A step changes weights and moments in `update` alone. An error before or after it leaves the state of the last step as it
was, but for the random numbers that were drawn since, which are put back. An error in the middle of it leaves half of an
update, and that is never saved.
"""

from __future__ import annotations

from collections.abc import Callable

from nightschool.errors import DiskFull, Interrupted, NonFiniteLoss
from nightschool.training.checkpoint import rng
from nightschool.training.metrics import say
from nightschool.training.state import Soundness, TrainState
from nightschool.training.task import Task

# Writes a checkpoint with this random state, and returns when it is on the disk.
Rescue = Callable[[TrainState, rng.RandomState], None]

# What ends a run after saving, what says that the weights are not worth it, and a disk on which nothing finds room.
_NOT_RESCUED = (Interrupted, NonFiniteLoss, DiskFull)


def save_in_emergency(
    error: Exception,
    task: Task,
    state: TrainState,
    soundness: Soundness,
    settle: Callable[[], None],
    rescue: Rescue,
) -> None:
    """Save what an error leaves, unless it ended the run after saving or says that the weights are not worth it; say what became of it.

    Args:
        error: What ends the run; whoever calls lets it go on.
        task: What learns.
        state: Where the run is.
        soundness: Told by whoever makes the steps.
        settle: Takes the losses of the steps so far into the state; raises NonFiniteLoss if one is none.
        rescue: Saves.
    """
    if isinstance(error, _NOT_RESCUED):
        return
    kind = type(error).__name__
    last = (
        "There is no checkpoint"
        if state.saved_step is None
        else f"The last checkpoint is that of step {state.saved_step}"
    )
    if not soundness.holds:
        say(f"{kind} in the middle of the update of step {state.step + 1}, so the state is not saved. {last}")
        return
    if state.saved_step == (state.step or None):
        say(f"{kind} after step {state.step}. {last}, and nothing was done since")
        return
    before = state.saved_at, state.saved_step
    try:
        task.discard_gradients()
        settle()
        state.saved_at, state.saved_step = state.seconds, state.step
        rescue(state, soundness.random_state)
    except Exception as second:
        state.saved_at, state.saved_step = before
        say(f"{kind} after step {state.step}, and its state could not be saved either: {second} {last}")
    else:
        say(f"{kind} after step {state.step}: its state is saved. Go on from it with --resume latest")
