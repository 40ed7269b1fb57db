"""A memory as one client has it, and what it is answered over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nightschool.memory.graph import KnowledgeGraph

Why = Callable[[str, str | None, int], dict[str, Any]]
"""Of a question, the model that is asked (None: the one that is there) and the longest answer in tokens: the answer, what was read for
it, and each of its tokens with where it came from. It blocks, and raises NightschoolError with what to do where there is no model."""


@dataclass(frozen=True)
class Served:
    """What the tools of one client use."""

    graph: KnowledgeGraph
    why: Why


@dataclass(frozen=True)
class HttpAnswer:
    """A whole response."""

    status: int
    headers: dict[str, str]
    body: bytes
