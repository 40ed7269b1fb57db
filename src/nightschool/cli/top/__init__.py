"""`nightschool top`: the runs as they go."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from nightschool.cli.output import answer, session
from nightschool.cli.top.text import describe
from nightschool.errors import NotFound, UsageError
from nightschool.store.home import Home
from nightschool.units import printable
from nightschool.views.monitor import Monitor


def top(run_id: str | None = None, /, *, once: bool = False, refresh: float = 3.0, logs: bool = False) -> None:
    """Watch runs: step, losses, tokens per second, time left, bytes, checkpoints, processor and GPU.

    On a terminal the arrow keys choose a run, l shows its log, and q leaves; elsewhere frames are printed one below
    the other. The runs go on, whoever watches.

    Args:
        run_id: The run to show in detail; without it one that is running, else the newest.
        once: Print one frame and leave.
        refresh: Seconds between frames.
        logs: Show the end of the log as well.
    """
    if refresh <= 0:
        raise UsageError(f"--refresh {refresh:g} is not above 0. Write seconds between frames, such as 3.")
    monitor = Monitor(Home.find())
    if once or session().json:
        frame = monitor.frame(run_id)
        answer(frame, lambda: describe(frame, logs=logs), quiet=str(frame["run_id"]))
    elif _is_terminal():
        from nightschool.cli.top.app import TopApp

        TopApp(monitor, run_id, refresh_seconds=refresh, logs=logs).run()
    else:
        _print_frames(monitor, run_id, refresh, logs=logs)


def _is_terminal() -> bool:
    return sys.stdout.isatty() and sys.stdin.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _print_frames(monitor: Monitor, run_id: str | None, refresh: float, *, logs: bool) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                text = describe(monitor.frame(run_id), logs=logs)
            except NotFound as error:
                text = str(error)
            print(printable(text), end="\n\n", flush=True)
            time.sleep(refresh)
