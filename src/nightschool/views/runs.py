"""Runs as people look at them: one line each, their figures as they come, the end of their log.

Files are read while others write them. What cannot be read at this moment, or is damaged, is shown as unknown.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

from nightschool.errors import NightschoolError
from nightschool.store.runs import Run
from nightschool.views.metrics_rows import Row, RowsFollower, is_number, parse_row, read_rows

POLL_SECONDS = 0.5
LOG_LINES = 200
TAIL_BYTES = 65_536

# What reading files that others write may raise: they vanish, are half there, or hold something else.
UNREADABLE = (NightschoolError, OSError, LookupError, ValueError, TypeError, AttributeError, psutil.Error)
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

T = TypeVar("T")


def tried(look: Callable[[], T], otherwise: T) -> T:
    """What a look finds, or `otherwise` where it cannot be had at this moment."""
    try:
        return look()
    except UNREADABLE:
        return otherwise


def run_summary(run: Run, rows: list[Row] | None = None) -> dict[str, Any]:
    """One line of a list of runs: its status, and the figures of its rows (read here if they are not given)."""
    rows = read_rows(run.metrics_path) if rows is None else rows
    heldout, losses = ([row[key] for row in rows if is_number(row.get(key))] for key in ("heldout_loss", "loss"))
    last: Row = rows[-1] if rows else {}
    state = run.status.effective_state
    return {
        **dataclasses.asdict(run.status),
        "state": state,
        "loss": last.get("loss"),
        "best_loss": min(losses, default=None),
        "heldout_loss": heldout[-1] if heldout else None,
        "best_heldout_loss": min(heldout, default=None),
        "tokens_per_second": last.get("tokens_per_second"),
        "tokens_trained": last.get("tokens_trained_total"),
        "peak_bytes": last.get("peak_bytes"),
        "seconds": last.get("seconds"),
        "perplexity": last.get("perplexity"),
        "bits_per_byte": last.get("bits_per_byte"),
        "heldout_perplexity": _newest(rows, "heldout_perplexity"),
        "heldout_bits_per_byte": _newest(rows, "heldout_bits_per_byte"),
        "mfu": last.get("mfu"),
        "eta_seconds": last.get("eta_seconds") if state == "running" else None,
    }


def _newest(rows: list[Row], key: str) -> Any:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def follow_metrics(run: Run) -> Iterator[Row]:
    """Every row, those that are there and those that come, until the run has ended."""
    seen, follower = 0, RowsFollower(run.metrics_path)
    while True:
        ended = run.status.is_final or (run.status.state == "running" and run.status.find_process() is None)
        rows = follower.update()
        # A resumed run rewrites the rows after its checkpoint: go on from what is there.
        seen = min(seen, len(rows))
        yield from rows[seen:]
        seen = len(rows)
        if ended:
            return
        time.sleep(POLL_SECONDS)


def log_tail(path: Path) -> list[str]:
    """The last lines of a log, without colours; none where there is no log."""
    return without_colours(tried(lambda: _tail(path), "")).splitlines()[-LOG_LINES:]


def last_sample(path: Path) -> dict[str, Any] | None:
    """What the model wrote when it was last asked to, if the end of the events still tells."""
    for line in reversed(tried(lambda: _tail(path), "").splitlines()):
        event = parse_row(line)
        if event is not None and event.get("event") == "sample":
            return {key: event.get(key) for key in ("step", "prompt", "continuation")}
    return None


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def without_colours(text: str) -> str:
    """The text without terminal colours."""
    return _ANSI.sub("", text)
