"""How runs, figures and moments are written on the screen, and how those that a user names are found."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from nightschool.errors import NotFound, UsageError
from nightschool.store import checkpoints
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.runs import Run, RunStore

_BARS = "▁▂▃▄▅▆▇█"
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as bars, the newest at the right; each bar is the mean of as many values as do not fit."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    groups = min(width, len(finite))
    means = []
    for index in range(groups):
        part = finite[index * len(finite) // groups : (index + 1) * len(finite) // groups]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def duration(seconds: float) -> str:
    """`0:42`, `3:07`, `2:15:00`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def moment(value: datetime | str | None) -> str | None:
    """A moment as `2026-11-21 03:00:00` in UTC; None stays None."""
    if value is None:
        return None
    return f"{datetime.fromisoformat(value) if isinstance(value, str) else value:%Y-%m-%d %H:%M:%S}"


def figure(value: Any, digits: int = 4) -> str | None:
    """A number with that many significant digits; None stays None, other things are written as they are."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return None if value is None else str(value)


def plain(text: str) -> str:
    """The text without colours."""
    return _ANSI.sub("", text)


def find_run(home: Home, wanted: str | None) -> Run:
    """The run of this id, `latest`, or with None the newest.

    Raises:
        NotFound: If there is no such run.
    """
    store = RunStore(home)
    if wanted is not None and wanted != "latest":
        return store.get(wanted)
    runs = store.ls()
    if not runs:
        raise NotFound(f"There are no runs in {home.runs} yet. Begin one with nightschool train RECIPE.")
    return runs[0]


def find_checkpoint(home: Home, wanted: str) -> tuple[Run, Checkpoint]:
    """A checkpoint by its folder, by `RUN/CHECKPOINT`, or by its name alone where one run has it.

    Raises:
        NotFound: If there is none.
        UsageError: If several runs have one of this name.
    """
    store = RunStore(home)
    given = Path(os.path.abspath(wanted))  # noqa: PTH100  the folder may be a link; its own name counts
    if given.parent.name == "checkpoints" and given.parent.parent.parent == home.runs:
        run = store.get(given.parent.parent.name)
        return run, checkpoints.get(run, given.name)
    run_id, slash, name = wanted.partition("/")
    if slash:
        run = store.get(run_id)
        return run, checkpoints.get(run, name)
    found = [(run, point) for run in store.ls() for point in checkpoints.ls(run) if point.name == wanted]
    if not found:
        raise NotFound(
            f"There is no checkpoint {wanted!r} in {home.runs}. List them with nightschool checkpoints ls RUN."
        )
    if len(found) > 1:
        runs = ", ".join(run.id for run, _ in found)
        raise UsageError(f"{len(found)} runs have a checkpoint {wanted}: {runs}. Write RUN/{wanted}.")
    return found[0]


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
