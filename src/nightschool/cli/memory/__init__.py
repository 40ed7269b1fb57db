"""`nightschool memory`: facts beside a model, which can be read, edited and taken back."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from nightschool.cli.formatting import moment as shown_moment
from nightschool.cli.output import Column, Row, answer, answer_rows, note
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


def answer_change(name: str, store: MemoryStore, change: Change, ids: Iterable[str], said: str | None = None) -> None:
    """Say what a write did, by numbers or as `said` has it, show the entries that it was about as it left them, and which versions learned what it ended."""
    entries = [_as_left(store, one, change.revision) for one in dict.fromkeys(ids)]
    stale = stale_since(name, store, change)
    lines = [
        said or f"{name} is at revision {change.revision}: {counts_of(change) or 'nothing to change'}.",
        *_what_became(store, change, entries),
        *stale_lines(stale),
    ]
    answer(
        {"name": name, **change.to_json(), "entries": [one.to_json() for one in entries], "stale": stale},
        "\n".join(lines),
        quiet="\n".join(one.id for one in entries),
    )


def counts_of(change: Change) -> str:
    """How many entries a write added, replaced and ended, and how many facts it knew already; empty if it was about none."""
    counts = {
        "added": change.added,
        "replaced": change.superseded,
        "ended": change.removed,
        "known already": change.unchanged,
    }
    return ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)


def _as_left(store: MemoryStore, entry: str, revision: int) -> MemoryEntry:
    """An entry as a revision left it, which may have ended it; whatever others wrote since."""
    return [one for one in store.history(entry) if one.born <= revision][-1]


def _what_became(store: MemoryStore, change: Change, entries: list[MemoryEntry]) -> list[str]:
    """The entries that a write was about, each with what it said before, and those that it ended beside them."""
    has_old = change.superseded or change.removed
    changed = store.diff(change.revision - 1, change.revision) if has_old else []
    old = {one.id: one.before.text for one in changed if one.before is not None}
    shown = {one.id for one in entries}
    return [
        *(_line(one, old.get(one.id), change.revision) for one in entries),
        *(f"{one.id}  ended: {old[one.id]}" for one in changed if one.after is None and one.id not in shown),
    ]


def _line(entry: MemoryEntry, before: str | None, revision: int) -> str:
    if not entry.is_in(revision):
        return f"{entry.id}  ended: {entry.text}"
    return f"{entry.id}  {entry.text}" + (f"  (was: {before})" if before not in (None, entry.text) else "")


def answer_entries(entries: list[MemoryEntry], *, none: str, ids: list[str] | None = None) -> None:
    """Show entries as a table, and since and until when they hold where one of them says so; under other ids where they are of
    several memories.
    """
    shown = [one.id for one in entries] if ids is None else ids
    has_period = any(one.valid_from or one.valid_to for one in entries)
    answer_rows(
        [one.to_json() | {"id": name} for one, name in zip(entries, shown, strict=True)],
        {
            "ID": "id",
            "TEXT": text_of,
            **({"HOLDS FROM": _valid("valid_from"), "UNTIL": _valid("valid_to")} if has_period else {}),
            "SOURCE": lambda row: row["source"] or None,
            "REVISION": "revision",
        },
        none=none,
        quiet="id",
    )
    note_damage(entries)


def text_of(row: Row) -> str:
    """What an entry says; of one that is damaged that it is not what was written."""
    return f"{row['text']}  (damaged)" if row["damaged"] else str(row["text"])


def note_damage(entries: Iterable[MemoryEntry]) -> None:
    """Say of each entry that is damaged what is wrong with it, and what helps."""
    for entry in entries:
        if entry.damaged:
            note(entry.damage)


def _valid(field: str) -> Column:
    """A bound of the time in which an entry holds: the day alone where it is midnight."""

    def shown(row: Row) -> str | None:
        text = shown_moment(row[field])
        return None if text is None else text.removesuffix(" 00:00:00")

    return shown
