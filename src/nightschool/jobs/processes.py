"""Which process is at a run, and how it ended."""

from __future__ import annotations

import signal
import time

from nightschool.errors import Conflict
from nightschool.store.runs import Run
from nightschool.work.stop import Stop


def ask_to_stop(run: Run) -> int:
    """Send SIGTERM to the process that trains `run`: it finishes its step, saves and ends. Returns its pid.

    Raises:
        Conflict: If no process trains it.
    """
    process = run.status.find_process()
    if process is None:
        raise Conflict(
            f"No process trains the run {run.id}; its state is {run.status.effective_state}. There is nothing to stop."
        )
    process.send_signal(signal.SIGTERM)
    return int(process.pid)


def wait_for_stranger(run: Run, stop: Stop) -> int:
    """Wait for a training process that somebody else started, handing it the signals that `stop` notes.

    Returns:
        The exit code that it left in status.json; 1 if it could leave none.
    """
    asked = False
    while (process := run.status.find_process()) is not None:
        if stop.wait(0.2 if not stop.requested else 0.0) and not asked:
            process.send_signal(signal.SIGTERM)
            asked = True
        if asked:
            time.sleep(0.2)
    code = run.status.exit_code
    return 1 if code is None else code


def how_it_ended(exit_code: int) -> str:
    """`exited with code 3`, or `was killed by SIGKILL (…)`, for a person to read."""
    if exit_code >= 0:
        return f"the process exited with code {exit_code}"
    number = -exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = "; the machine may have run out of memory" if number == signal.SIGKILL else ""
    return f"the process was killed by {name}{hint}"
