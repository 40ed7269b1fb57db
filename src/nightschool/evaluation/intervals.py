"""How far off a share may be that was counted in a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Of a normal distribution, 95 % lie within so many standard deviations.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """`count` of `asked`, with its 95 % interval after Wilson (1927), which is right near 0 and 1 too."""

    count: int
    asked: int

    @property
    def share(self) -> float | None:
        """None where nothing was asked."""
        return self.count / self.asked if self.asked else None

    @property
    def interval(self) -> tuple[float, float]:
        """The least and the largest share that it may well be; 0 and 1 where nothing was asked."""
        if not self.asked:
            return 0.0, 1.0
        n, p, z2 = self.asked, self.count / self.asked, _Z**2
        middle, scale = p + z2 / (2 * n), 1 + z2 / n
        width = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # At the ends rounding would leave a hair between the share and its bound.
        low = 0.0 if self.count == 0 else (middle - width) / scale
        high = 1.0 if self.count == n else (middle + width) / scale
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        low, high = self.interval
        return {"count": self.count, "asked": self.asked, "share": self.share, "low": low, "high": high}
