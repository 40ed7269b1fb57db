"""`nightschool memory`: facts beside a model, which can be read, edited and taken back."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nightschool.cli.output import answer, answer_rows
from nightschool.errors import UsageError
from nightschool.memory.entry import Change, MemoryEntry, parse_moment
from nightschool.memory.store import KEEP, Keep, MemoryStore
from nightschool.store.home import Home
from nightschool.store.names import memory_path


def opened(name: str) -> MemoryStore:
    """The memory of that name. Raises NotFound if there is none."""
    return MemoryStore.open(memory_path(Home.find(), name))


def moment(text: str | None, option: str) -> datetime | None:
    """The date that an option gives; None for `none`, and where it is not given.

    Raises:
        UsageError: If it is no date.
    """
    if text is None or text.casefold() == "none":
        return None
    try:
        return parse_moment(text)
    except ValueError:
        raise UsageError(
            f"{option}: {text!r} is no date. Write 2026-11-27, 2026-11-27T08:00:00Z, or none for an open end."
        ) from None


def changed_moment(text: str | None, option: str) -> datetime | Keep | None:
    """As `moment`, but what is not given stays as it is."""
    return KEEP if text is None else moment(text, option)


def stale_since(name: str, store: MemoryStore, change: Change) -> list[dict[str, Any]]:
    """What versions learned of the statements that a write ended."""
    if not (change.superseded or change.removed):
        return []
    from nightschool.memory.staleness import stale_versions  # reads runs and the registry: only where it is needed

    return [one.to_json() for one in stale_versions(Home.find(), name, store, since=change.revision - 1)]


def stale_lines(stale: list[dict[str, Any]]) -> list[str]:
    """Statements that hold no longer, with the versions that learned them."""
    return [f"{', '.join(one['versions'])} learned what holds no longer: {one['text']}" for one in stale]


def answer_change(name: str, store: MemoryStore, change: Change, entries: list[MemoryEntry]) -> None:
    """Say what a write did, show the entries that it was about, and which versions learned what it ended."""
    stale = stale_since(name, store, change)
    counts = {
        "added": change.added,
        "changed": change.superseded,
        "ended": change.removed,
        "unchanged": change.unchanged,
    }
    said = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count) or "nothing to change"
    lines = [
        f"{name} is at revision {change.revision}: {said}.",
        *(f"{one.id}  {one.text}" for one in entries),
        *stale_lines(stale),
    ]
    answer(
        {"name": name, **change.to_json(), "entries": [one.to_json() for one in entries], "stale": stale},
        "\n".join(lines),
        quiet="\n".join(one.id for one in entries),
    )


def answer_entries(entries: list[MemoryEntry], *, none: str, ids: list[str] | None = None) -> None:
    """Show entries as a table; under other ids where they are of several memories."""
    shown = [one.id for one in entries] if ids is None else ids
    answer_rows(
        [one.to_json() | {"id": name} for one, name in zip(entries, shown, strict=True)],
        {"ID": "id", "TEXT": "text", "SOURCE": lambda row: row["source"] or None, "SINCE": lambda row: row["revision"]},
        none=none,
        quiet="id",
    )
