"""A line of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlanRow:
    """A line of the plan: for people, and the same as `facts` for programs. Without a label it is not printed."""

    label: str
    text: str
    facts: dict[str, Any]
