"""Memories that lie over one another: what the upper one says of a subject and a relation, or takes back, hides what those beneath say.

A tenant's memory may lie over one that is shared with all tenants, and a user's or a session's over that. Each stays a memory of its own,
with its own index; nothing is copied, and who reads other layers never sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

from nightschool.errors import UsageError
from nightschool.events import now
from nightschool.memory.entry import MemoryEntry
from nightschool.memory.facts.retractions import is_retraction
from nightschool.memory.memory import Findings, Found, Memory
from nightschool.memory.store import MemoryStore


def check_overlays(name: str, overlays: Sequence[str]) -> None:
    """Raises UsageError if a memory is to lie over itself."""
    known = {name}
    for one in overlays:
        if one in known:
            raise UsageError(f"The memory {one!r} cannot lie over itself. Name another one as the overlay.")
        known.add(one)


def search_words(
    layers: Sequence[tuple[str, MemoryStore]], query: str, limit: int
) -> tuple[dict[str, int], list[tuple[str, MemoryEntry]]]:
    """The entries that hold words of a query, as a question that is asked of all layers sees them; those of the upper ones first.

    Args:
        layers: What each memory is called, and its store, the uppermost first.
        query: Words, or beginnings of words.
        limit: At most so many.

    Returns:
        The revision of each, and each entry with what its memory is called.
    """
    revisions: dict[str, int] = {}
    found: list[tuple[str, MemoryEntry]] = []
    above: list[tuple[MemoryStore, int]] = []
    for label, store in layers:
        revision = revisions[label] = store.revision
        found += [
            (label, entry)
            for entry in store.search(query, at=revision, limit=limit)
            if not is_retraction(entry) and not any(upper.hides(entry, at=at) for upper, at in above)
        ]
        above.append((store, revision))
    return revisions, found[:limit]


class Searched(Protocol):
    """What is searched for a question: one memory, or several that lie over one another."""

    @property
    def name(self) -> str: ...

    def find(self, texts: Sequence[str], k: int = 16, *, moment: datetime | None = None) -> list[Findings]:
        """See `Memory.find`."""

    def close(self) -> None:
        """See `Memory.close`."""


@dataclass(frozen=True)
class Layer:
    """One of the memories. `label` tells it from the others; of the one that is asked for it is its name."""

    label: str
    memory: Memory


class Layers:
    """Memories, the uppermost first, that are asked as one. `name` is that of the one that was asked for."""

    def __init__(self, name: str, layers: Sequence[Layer]) -> None:
        self.name, self._layers = name, tuple(layers)

    def find(self, texts: Sequence[str], k: int = 16, *, moment: datetime | None = None) -> list[Findings]:
        """What all of them have for each question, best first; each as one revision of it has it."""
        moment = moment or now()
        by_layer = [layer.memory.find(texts, k, moment=moment) for layer in self._layers]
        return [self._merged(findings, k) for findings in zip(*by_layer, strict=True)]

    def close(self) -> None:
        """Close all of them."""
        for layer in self._layers:
            layer.memory.close()

    def _merged(self, findings: Sequence[Findings], k: int) -> Findings:
        seen: list[Found] = []
        for depth, (layer, finding) in enumerate(zip(self._layers, findings, strict=True)):
            above = list(zip(self._layers[:depth], findings[:depth], strict=True))
            seen += [
                self._labelled(one, layer.label)
                for one in finding.found
                if not any(upper.memory.store.hides(one.entry, at=told.revision) for upper, told in above)
            ]
        revisions = tuple(
            (layer.label, finding.revision) for layer, finding in zip(self._layers, findings, strict=True)
        )
        by_name = dict(revisions)
        best = sorted(seen, key=lambda one: -one.score)[:k]
        return Findings(by_name.get(self.name, revisions[-1][1]), tuple(best), revisions)

    def _labelled(self, found: Found, label: str) -> Found:
        # Each memory counts its entries from m1.
        return found if label == self.name else replace(found, memory=label, id=f"{label}/{found.id}")
