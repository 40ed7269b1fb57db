"""How long to wait before something that has failed is tried again."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class BackOff:
    """Pauses that double from `first_seconds` to `longest_seconds`; each is random between its half and its whole."""

    first_seconds: float
    longest_seconds: float

    def pause_seconds(self, attempts: int) -> float:
        """The pause after so many failed attempts, 1 or more."""
        # 2**30 s is longer than any pause, and larger powers would overflow a float at last.
        longest = min(self.longest_seconds, self.first_seconds * 2 ** min(max(attempts, 1) - 1, 30))
        return random.uniform(longest / 2, longest)
