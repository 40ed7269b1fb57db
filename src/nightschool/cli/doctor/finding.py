"""What the doctor says about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `todo` says what to do next; it is empty where there is nothing to do."""

    subject: str
    verdict: Verdict
    found: str
    todo: str = ""
