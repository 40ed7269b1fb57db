"""How figures, durations and moments are written on the screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

_BARS = "▁▂▃▄▅▆▇█"
_ARROWS = {"falling": "↓", "rising": "↑", "level": "→"}


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


def learning_rate(value: float | None) -> str | None:
    """A learning rate, as `1.90e-04`."""
    return None if value is None else f"{value:.2e}"


def loss(value: float | None) -> str | None:
    """A loss with six decimals."""
    return None if value is None else f"{value:.6f}"


def trend_arrow(value: str | None) -> str | None:
    """`↓ falling`."""
    return None if value is None else f"{_ARROWS[value]} {value}"
