"""What the doctor says about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """What was found, and what to do next; `todo` is empty where there is nothing to do."""

    verdict: Verdict
    found: str
    todo: str = ""
