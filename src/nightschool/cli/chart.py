"""Curves in the terminal, drawn with braille dots, which every terminal that shows UTF-8 has."""

from __future__ import annotations

import math
from collections.abc import Sequence

Points = Sequence[tuple[float, float]]

# The eight dots of a braille character, by column and row.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800
# As wide as `-1.234e+100`.
_LABEL_WIDTH = 11


def chart(title: str, points: Points, *, width: int, height: int) -> str:
    """One curve as lines of text: its title, then `height` rows at most `width` characters wide, then its steps.

    Values that are not finite are left out; what lies between two points is joined by a straight line.
    """
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return f"{title}: nothing to draw"
    columns, rows = 2 * max(1, width - _LABEL_WIDTH - 2), 4 * height
    finite = _thinned(finite, columns)
    left, right = min(x for x, _ in finite), max(x for x, _ in finite)
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    dots = [
        (_scaled(x, left, right, columns), rows - 1 - _scaled(y, low, high, rows, flat=rows // 2)) for x, y in finite
    ]
    cells = [[_BLANK] * (columns // 2) for _ in range(height)]
    for start, end in zip(dots, dots[1:] or dots, strict=False):
        for x, y in _line(start, end):
            cells[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    lines = [
        f"{labels.get(row, ''):>{_LABEL_WIDTH}} ┤{''.join(map(chr, line)).rstrip(chr(_BLANK))}"
        for row, line in enumerate(cells)
    ]
    first, last = f"{left:g}", f"{right:g}"
    axis = f"{'':{_LABEL_WIDTH}}  {first}{last.rjust(max(len(last) + 1, columns // 2 - len(first)))}"
    return "\n".join([title, *lines, axis])


def _thinned(points: list[tuple[float, float]], columns: int) -> list[tuple[float, float]]:
    """Of each column's points the first, the lowest, the highest and the last one: what a long curve shows anyway."""
    if len(points) <= 8 * columns:
        return points
    kept = []
    for column in range(columns):
        part = points[column * len(points) // columns : (column + 1) * len(points) // columns]
        heights = [height for _, height in part]
        places = {0, heights.index(min(heights)), heights.index(max(heights)), len(part) - 1}
        kept += [part[place] for place in sorted(places)]
    return kept


def _scaled(value: float, low: float, high: float, size: int, *, flat: int = 0) -> int:
    """Where a value lies among `size` dots; `flat` where all values are the same."""
    # Halved, because the whole difference of two large numbers may be infinite.
    span = high / 2 - low / 2
    return flat if span == 0 else min(size - 1, int((value / 2 - low / 2) / span * (size - 1) + 0.5))


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (
            round(start[0] + (end[0] - start[0]) * index / count),
            round(start[1] + (end[1] - start[1]) * index / count),
        )
        for index in range(count + 1)
    ]
