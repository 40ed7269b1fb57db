"""Who set a setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Origin:
    """`where` is `file:line`, the name of a variable, or the override as it was typed; empty for a default."""

    kind: Literal["default", "recipe", "environment", "override"]
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}" if self.where else self.kind
