"""What spot checks found, for the terminal: learned against drift, and a line for each step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from nightschool.cli.chart import chart
from nightschool.cli.output import table
from nightschool.views.runs import Checked

_HEIGHT = 8
_MOST_LINES = 12


def trade_off(checks: Sequence[Checked], published: int | None) -> str:
    """The curve and its table, of long ones some steps; empty where nothing was checked."""
    if not checks:
        return ""
    points = [(round(drift, 4), 100 * learned) for _, learned, drift in checks if drift is not None]
    parts = []
    if len(points) > 1:
        title = f"learned, % (up), against drift, nats a token (right), from step {checks[0][0]} to {checks[-1][0]}"
        parts.append(chart(title, points, width=min(shutil.get_terminal_size().columns, 100), height=_HEIGHT))
    rows = [
        (step, f"{learned:.0%}", "-" if drift is None else f"{drift:.4f}", "published" if step == published else "")
        for step, learned, drift in _some(checks, published)
    ]
    return "\n\n".join([*parts, table(("STEP", "LEARNED", "DRIFT", ""), rows)])


def _some(checks: Sequence[Checked], published: int | None) -> list[Checked]:
    """At most so many, evenly, the last and the published one among them."""
    every = -(-len(checks) // _MOST_LINES)
    last = len(checks) - 1
    return [check for place, check in enumerate(checks) if (last - place) % every == 0 or check[0] == published]
