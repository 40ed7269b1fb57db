"""Runs as people look at them: one line each, their figures as they come, the end of their log.

Files are read while others write them. What cannot be read at this moment, or is damaged, is shown as unknown.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from nightschool.errors import NightschoolError
from nightschool.events import Row, parse_row, read_events
from nightschool.store.runs import Run, RunStatus
from nightschool.views.metrics_rows import RowsFollower, is_number, read_rows

POLL_SECONDS = 0.5
LOG_LINES = 200
# The time left follows from this many last rows, so that a slow start does not count for ever.
SPEED_ROWS = 50
TAIL_BYTES = 65_536

# What reading files that others write may raise: they vanish, are half there, or hold something else.
UNREADABLE = (NightschoolError, OSError, LookupError, ValueError, TypeError, AttributeError, psutil.Error)
# Figures of which a line shows what the last row says.
_NEWEST_FIGURES = ("token_accuracy", "tokens_per_second", "peak_bytes", "seconds", "perplexity", "bits_per_byte", "mfu")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

T = TypeVar("T")
Points = list[tuple[float, float]]
Checked = tuple[int, float, float | None]


def tried(look: Callable[[], T], otherwise: T) -> T:
    """What a look finds, or `otherwise` where it cannot be had at this moment."""
    try:
        return look()
    except UNREADABLE:
        return otherwise


def run_summary(run: Run, rows: list[Row] | None = None) -> dict[str, Any]:
    """One line of a list of runs: its status, and the figures of its rows (read here if they are not given)."""
    rows = read_rows(run.metrics_path) if rows is None else rows
    status = tried(lambda: run.status, RunStatus(run_id=run.id, name=run.name, state="queued"))
    state = tried(lambda: run.status.effective_state, "unreadable")
    last = figures_of(rows[-1]) if rows else {}
    heldout = figures_by_step(rows, "heldout_loss")
    return {
        **dataclasses.asdict(status),
        "state": state,
        "loss": last.get("loss"),
        "best_loss": min((loss for _, loss in figures_by_step(rows, "loss")), default=None),
        "heldout_loss": heldout[-1][1] if heldout else None,
        "best_heldout_loss": min((loss for _, loss in heldout), default=None),
        "tokens_trained": last.get("tokens_trained_total"),
        **{key: last.get(key) for key in _NEWEST_FIGURES},
        **{
            key: _newest(rows, key) for key in ("heldout_token_accuracy", "heldout_perplexity", "heldout_bits_per_byte")
        },
        "eta_seconds": last.get("eta_seconds") if state == "running" else None,
    }


def figures_of(row: Row) -> dict[str, float]:
    """Those figures of a row that are numbers."""
    return {key: value for key, value in row.items() if is_number(value)}


def figures_by_step(rows: list[Row], key: str) -> Points:
    """Every number of this name, with its step."""
    return [(row["step"], row[key]) for row in rows if is_number(row.get(key))]


def spot_checks_of(rows: list[Row]) -> list[Checked]:
    """What spot checks found: the step, the share that was learned, and the drift in nats a token, where it was measured."""
    return [(row["step"], row["learned"], row.get("drift")) for row in rows if is_number(row.get("learned"))]


def published_step(run: Run) -> int | None:
    """The step whose weights the run has published."""
    none: list[Row] = []
    events = tried(lambda: list(read_events(run.events_path)), none)
    return next((event.get("step") for event in reversed(events) if event.get("event") == "published"), None)


def _newest(rows: list[Row], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if is_number(row.get(key))), None)


# When what is wanted after a run is made ready: when its end is near, or nobody knows yet how long it takes; and no more when
# that is far off.
NEAR_SECONDS, FAR_SECONDS = 60.0, 180.0


def seconds_left(rows: list[Row], total: int | None) -> float | None:
    """Until the run ends: what it says itself, else what its last rows say; None where neither does."""
    if not rows:
        return None
    last = figures_of(rows[-1])
    if "eta_seconds" in last:
        return last["eta_seconds"]
    first: dict[str, float] = figures_of(rows[-SPEED_ROWS]) if len(rows) > SPEED_ROWS else {"step": 0, "seconds": 0.0}
    if total is None or "seconds" not in last or "seconds" not in first or last["step"] <= first["step"]:
        return None
    seconds_per_step = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    return max(0.0, (total - last["step"]) * seconds_per_step)


def run_curves(run: Run) -> dict[str, Points]:
    """Loss, held-out loss and learning rate over the steps."""
    rows = read_rows(run.metrics_path)
    keys = {"loss": "loss", "held-out loss": "heldout_loss", "learning rate": "learning_rate"}
    return {name: figures_by_step(rows, key) for name, key in keys.items()}


def settings_that_differ(recipes: Sequence[Any]) -> dict[str, list[Any]]:
    """The settings in which recipes differ, by dotted key: the value of each, None where it has none."""
    settings = [flatten(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for one in settings for key in one)
    values = {key: [one.get(key) for one in settings] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def flatten(plain_values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    if isinstance(plain_values, dict):
        pairs = [(str(key), value) for key, value in plain_values.items()]
    elif isinstance(plain_values, list) and any(isinstance(value, dict) for value in plain_values):
        pairs = [(str(index), value) for index, value in enumerate(plain_values)]
    else:
        return {prefix: plain_values}
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


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
    return without_colours(tried(lambda: tail(path), "")).splitlines()[-LOG_LINES:]


def last_sample(path: Path) -> dict[str, Any] | None:
    """What the model wrote when it was last asked to, if the end of the events still tells."""
    for line in reversed(tried(lambda: tail(path), "").splitlines()):
        event = parse_row(line)
        if event is not None and event.get("event") == "sample":
            return {key: event.get(key) for key in ("step", "prompt", "continuation")}
    return None


def tail(path: Path) -> str:
    """The last bytes of a file that may be long, as text; the first line may be cut. Raises OSError without one."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def without_colours(text: str) -> str:
    """The text without terminal colours."""
    return _ANSI.sub("", text)
