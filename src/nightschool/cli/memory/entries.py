"""`nightschool memory ls, add, edit, rm, search, history`: entries, one by one."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

from cyclopts import Parameter

from nightschool.cli.formatting import moment as shown_moment
from nightschool.cli.memory import answer_change, answer_entries, changed_moment, moment, note_damage, opened, text_of
from nightschool.cli.output import answer, answer_rows, confirm, note, who
from nightschool.errors import UsageError
from nightschool.memory.entry import MemoryEntry, NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.store.atomic import remove_folder
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from nightschool.units import format_bytes
from nightschool.views.memories import describe_memory, memory_rows


def ls(name: str | None = None, /, *, at: str | None = None, after: str | None = None, limit: int = 50) -> None:
    """List memories; of one memory, its entries, oldest first.

    Args:
        name: A memory. Without it all memories are listed.
        at: A revision or a named version; by default the newest.
        after: Go on behind this entry.
        limit: At most so many entries; 0 lists all.
    """
    if name is None:
        answer_rows(
            memory_rows(Home.find()),
            {
                "NAME": "name",
                "ENTRIES": "entries",
                "REVISION": "revision",
                "CHANGED": lambda row: shown_moment(row["changed_at"]) if row["changed_at"] else None,
                "SIZE": lambda row: format_bytes(row["size_bytes"]),
                "PROBLEM": lambda row: row.get("problem"),
            },
            none="There is no memory yet. Make one with nightschool memory build NAME --from FILE.",
            quiet="name",
        )
        return
    with opened(name) as store:
        revision = store.revision_at(at)
        behind = store.get(after, at=revision).row if after is not None else 0
        entries = list(store.entries(at=revision, after=behind, limit=limit or None))
        count = store.count(at=revision)
    answer_entries(
        entries, none=f"{name} holds nothing at revision {revision}. Add a fact with nightschool memory add."
    )
    if entries and len(entries) < count:
        note(f"{len(entries):,} of {count:,} entries; --after {entries[-1].id} goes on, --limit 0 lists all.")


def add(
    name: str,
    /,
    *facts: str,
    subject: str | None = None,
    relation: str | None = None,
    value: str | None = None,
    source: str = "",
    valid_from: str | None = None,
    valid_to: str | None = None,
) -> None:
    """Remember facts. A new value of the same subject and relation takes the place of the old one, which stays in the history.

    Args:
        name: The memory.
        facts: Sentences, as "Ada lives in Oslo."
        subject: In place of a sentence: of what the fact is.
        relation: What is said of it, as "lives in".
        value: The value.
        source: Where it comes from, as chat_88.
        valid_from: Since when it holds: a date.
        valid_to: Until when, that day not included.
    """
    has_triple = any(part is not None for part in (subject, relation, value))
    if has_triple == bool(facts):
        raise UsageError("Give sentences, or --subject, --relation and --value.")
    begin, end = moment(valid_from, "--valid-from"), moment(valid_to, "--valid-to")
    new = [NewEntry(one, source=source, valid_from=begin, valid_to=end) for one in facts]
    if has_triple:
        new = [NewEntry("", subject or "", relation or "", value or "", source, begin, end)]
    with opened(name) as store:
        change = store.add(new, author=who())
        answer_change(name, store, change, change.ids)


def edit(
    name: str,
    entry: str,
    text: str | None = None,
    /,
    *,
    value: str | None = None,
    source: str | None = None,
    valid_from: str | None = None,
    valid_to: str | None = None,
) -> None:
    """Let an entry say something else. Its id stays, and what it said before stays in its history.

    Args:
        name: The memory.
        entry: Its id, as m12.
        text: The new sentence.
        value: In place of a sentence: the new value of the same subject and relation.
        source: Where that comes from.
        valid_from: Since when it holds: a date, or none.
        valid_to: Until when, that day not included: a date, or none.
    """
    with opened(name) as store:
        change = store.edit(
            entry,
            author=who(),
            text=text,
            value=value,
            source=source,
            valid_from=changed_moment(valid_from, "--valid-from"),
            valid_to=changed_moment(valid_to, "--valid-to"),
        )
        answer_change(name, store, change, [entry])


def rm(name: str, /, *entries: str, purge: bool = False, yes: bool = False) -> None:
    """End entries; they stay in the history. With --purge nothing of them stays. Without entries, delete the memory.

    An entry of another memory is ended in this one only: it is hidden wherever this memory lies over the other.

    Args:
        name: The memory.
        entries: Their ids, as m12; those of another memory with its name before them, as friends/m12.
        purge: Delete all versions of them for good, from the file and its log. It cannot be undone.
        yes: Do not ask, where something is deleted for good.
    """
    if not entries:
        if purge:
            raise UsageError("--purge needs entries. Without entries and --purge the whole memory is deleted.")
        _delete(name, yes=yes)
        return
    entries = tuple(one.removeprefix(f"{name}/") for one in entries)
    with opened(name) as store:
        others = [one for one in entries if "/" in one]
        if others:
            if purge or len(others) < len(entries):
                raise UsageError(
                    "Entries of other memories stay in these. End them by themselves, without --purge and without ids of this memory."
                )
            change = store.retract(*map(_other, others), author=who())
            answer_change(name, store, change, change.ids)
            return
        if not purge:
            change = store.remove(*entries, author=who())
            answer_change(name, store, change, [])
            return
        _purge(store, name, entries, yes=yes)


def search(
    name: str,
    query: str,
    /,
    *,
    overlay: Annotated[list[str] | None, Parameter(negative=())] = None,
    limit: int = 20,
    at: str | None = None,
) -> None:
    """Find entries by words, those with most of them first.

    Args:
        name: The memory.
        query: Words, or beginnings of words.
        overlay: Another memory that lies over it: its entries come first, and what it says or takes back hides what is beneath. Given
            several times, each lies over those before it.
        limit: At most so many.
        at: A revision or a named version; by default the newest.
    """
    if overlay:
        _search_layers(name, overlay, query, limit, at)
        return
    with opened(name) as store:
        found = store.search(query, at=at, limit=limit)
    answer_entries(found, none=f"{name} has no entry with any of these words.")


def history(name: str, entry: str | None = None, /, *, limit: int = 50) -> None:
    """Show what an entry said, and when; without an entry, who wrote what into the memory, newest first.

    Args:
        name: The memory.
        entry: Its id, as m12.
        limit: At most so many revisions; 0 lists all.
    """
    with opened(name) as store:
        if entry is not None:
            past = store.history(entry)
            answer_rows(
                [one.to_json() for one in past],
                {
                    "REVISION": "revision",
                    "ENDED": "ended",
                    "TEXT": text_of,
                    "SOURCE": lambda row: row["source"] or None,
                    "BY": lambda row: row["author"] or None,
                    "RECORDED": lambda row: shown_moment(row["recorded_at"]),
                },
                none="",
                quiet="text",
            )
            note_damage(past)
            return
        after = store.revision - limit if limit else -1
        revisions = [one.to_json() for one in reversed(store.revisions(after=max(-1, after)))]
    answer_rows(
        revisions,
        {
            "REVISION": "revision",
            "WHEN": lambda row: shown_moment(row["at"]),
            "BY": lambda row: row["author"] or None,
            "OPERATION": "operation",
            "WROTE": "born",
            "ENDED": "ended",
            "NOTE": lambda row: f"revision {row['note']}" if row["operation"] == "undo" else row["note"] or None,
        },
        none="",
        quiet="revision",
    )


def _search_layers(name: str, overlays: list[str], query: str, limit: int, at: str | None) -> None:
    from nightschool.memory.layers import (
        check_overlays,
        search_words,
    )  # brings the index along: only where it is needed

    check_overlays(name, overlays)
    if at is not None:
        raise UsageError("--at is a revision of one memory. Leave it out, or --overlay.")
    names = [*reversed(overlays), name]
    with ExitStack() as stores:
        _, found = search_words([(one, stores.enter_context(opened(one))) for one in names], query, limit)
    answer_entries(
        [entry for _, entry in found],
        none=f"{' and '.join(reversed(names))} have no entry with any of these words.",
        ids=[entry.id if label == name else f"{label}/{entry.id}" for label, entry in found],
    )


def _other(entry: str) -> tuple[str, MemoryEntry]:
    """An entry of another memory, with the name that is before its id, as answers show it."""
    name, _, number = entry.rpartition("/")
    with opened(name.removeprefix("shared:")) as store:
        return entry, store.get(number)


def _purge(store: MemoryStore, name: str, entries: tuple[str, ...], *, yes: bool) -> None:
    from nightschool.memory.staleness import purge  # reads runs and the registry

    confirm(f"Delete {', '.join(entries)} of {name} for good, with all versions?", yes=yes)
    done, learned = purge(Home.find(), name, store, entries, author=who())
    lines = [
        f"Purged {', '.join(done.entries)} of {name}: {done.num_rows:,} {'row' if done.num_rows == 1 else 'rows'}, from the file and its log"
        f"{', and its index, which is made anew' if done.index_dropped else ''}.",
        *([f"Not shown any longer in its named versions {', '.join(done.versions)}."] if done.versions else []),
        *(
            f"{', '.join(one.versions)} learned {one.entry}, and still know it. They are marked as tainted. Roll back, or train anew without it."
            for one in learned
        ),
        "Exports and copies that you made are not touched.",
    ]
    answer(
        {"name": name, **done.to_json(), "learned": [one.to_json() for one in learned]},
        "\n".join(lines),
        quiet="\n".join(done.entries),
    )


def _delete(name: str, *, yes: bool) -> None:
    home = Home.find()
    opened(name).close()
    facts = describe_memory(home, name)
    confirm(
        f"Delete the memory {name} with {facts['entries']:,} entries ({format_bytes(facts['size_bytes'])})?", yes=yes
    )
    remove_folder(memory_path(home, name))
    answer({"removed": name, "entries": facts["entries"]}, f"Deleted the memory {name}.", quiet=name)
