"""Which process is at a run, and how it ended."""

from __future__ import annotations

import signal
import time

import psutil

from nightschool.errors import Conflict, NightschoolError
from nightschool.store.locks import is_held
from nightschool.store.runs import Run
from nightschool.work.stop import Stop


class Killed(NightschoolError):
    """A process was killed by a signal that nobody of ours sent it."""


def ask_to_stop(run: Run) -> int:
    """Have the process that trains `run` finish its step, save and end it: by SIGTERM, if it trains no other. Returns its pid.

    Raises:
        Conflict: If no process trains it.
    """
    process = run.status.find_process()
    if process is None:
        raise Conflict(
            f"No process trains the run {run.id}; its state is {run.status.effective_state}. There is nothing to stop."
        )
    _ask(run, process)
    return int(process.pid)


def _ask(run: Run, process: psutil.Process) -> None:
    if run.status.shares_process:
        run.request_stop("somebody asked it to stop")
    else:
        process.send_signal(signal.SIGTERM)


def is_trained(run: Run) -> bool:
    """Whether a process trains it, also one that has not said so in status.json yet."""
    status = run.status
    # A process that trains others, too, lives on when this one has ended.
    return is_held(run.lock_path) or (not status.shares_process and status.find_process() is not None)


def wait_for_stranger(run: Run, stop: Stop) -> int:
    """Wait for a training process that somebody else started, handing it the signals that `stop` notes.

    Returns:
        The exit code that it left in status.json; as if by SIGKILL if it could leave none.
    """
    asked = False
    while is_trained(run):
        process = run.status.find_process()
        if stop.wait(0.2 if not stop.requested else 0.0) and process is not None and not asked:
            _ask(run, process)
            asked = True
        if stop.requested:
            time.sleep(0.2)
    code = run.status.exit_code
    return -signal.SIGKILL if code is None else code


def how_it_ended(exit_code: int) -> str:
    """`exited with code 3`, or `was killed by SIGKILL (…)`, for a person to read."""
    if exit_code >= 0:
        return f"the process exited with code {exit_code}"
    number = -exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = "; the machine may have run out of memory" if number == signal.SIGKILL else ""
    return f"the process was killed by {name}{hint}"
