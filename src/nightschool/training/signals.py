"""A signal asks the loop to stop: it finishes the step, saves, and leaves. A second one leaves at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECOND_SIGNAL_EXIT_CODE = 130


class StopRequest:
    """Whether somebody asked the run to stop, and how."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a stop request while the block runs.

    The second signal ends the process with exit code 130 without any clean-up: whatever was committed is whole,
    because it was committed by renaming, and what was not is lost with the step.
    """
    request = StopRequest()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request:
            os._exit(SECOND_SIGNAL_EXIT_CODE)
        request.reason = signal.Signals(number).name

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
