"""`nightschool memory undo, rollback, versions, diff, conflicts, resolve, relations`: what a memory was, and what it should be."""

from __future__ import annotations

import shlex
from typing import Literal

from nightschool.cli.formatting import moment as shown_moment
from nightschool.cli.memory import answer_change, opened, stale_lines, stale_since
from nightschool.cli.output import answer, answer_rows, who
from nightschool.errors import UsageError
from nightschool.memory.entry import MemoryEntry
from nightschool.store.home import Home


def undo(name: str, /) -> None:
    """Take back the newest write that was not taken back yet, as a new revision.

    Args:
        name: The memory.
    """
    with opened(name) as store:
        change = store.undo(author=who())
        undone = store.undone_by(change.revision)
        stale = stale_since(name, store, change)
    done = f"Took back revision {undone} of {name}, which is at revision {change.revision} now."
    answer(
        {"name": name, **change.to_json(), "undone": undone, "stale": stale},
        "\n".join([done, *stale_lines(stale)]),
        quiet=str(change.revision),
    )


def rollback(name: str, to: str, /) -> None:
    """Bring back the state of a revision or a named version, as a new revision. What was purged does not return.

    Args:
        name: The memory.
        to: A revision or a named version.
    """
    with opened(name) as store:
        before = store.revision
        change = store.rollback(to, author=who())
        count = store.count()
        stale = stale_since(name, store, change) if change.revision > before else []
    done = f"{name} was as {to} already." if change.revision == before else f"{name} is as {to} was."
    answer(
        {"name": name, "revision": change.revision, "to": to, "entries": count, "stale": stale},
        "\n".join([f"{done} It has {count:,} entries at revision {change.revision}.", *stale_lines(stale)]),
        quiet=str(change.revision),
    )


def versions(name: str, version: str | None = None, /, *, at: str | None = None, rm: bool = False) -> None:
    """List the named versions of a memory; with a name, give it to a revision.

    Args:
        name: The memory.
        version: A name, as monday.
        at: The revision that is named; by default the newest.
        rm: Forget the name. The revision stays.
    """
    with opened(name) as store:
        if version is not None and rm:
            store.remove_version(version)
            answer({"removed": version}, f"{version} is no version of {name} any more.", quiet=version)
            return
        if version is not None:
            made = store.name_version(version, author=who(), at=at)
            answer(made.to_json(), f"{version} is revision {made.revision} of {name}.", quiet=version)
            return
        if rm or at is not None:
            raise UsageError("Name the version that --rm or --at are for.")
        found = [one.to_json() for one in store.versions()]
    answer_rows(
        found,
        {"VERSION": "name", "REVISION": "revision", "NAMED": lambda row: shown_moment(row["at"]), "BY": "author"},
        none=f"{name} has no named versions. Name its newest revision with nightschool memory versions {name} VERSION.",
        quiet="name",
    )


def stale(name: str, /) -> None:
    """List the versions that learned what a memory no longer says, from the data of all runs of its tenant, and those that learned what was
    purged.

    Args:
        name: The memory.
    """
    from nightschool.memory.staleness import stale_versions, versions_that_learned_purged

    with opened(name) as store:
        home = Home.find()
        rows = [one.to_json() for one in stale_versions(home, name, store)]
        rows += [one.to_json() for one in versions_that_learned_purged(home, name, store)]
    answer_rows(
        rows,
        {
            "ID": "id",
            "NO LONGER": lambda row: row["text"] or "(purged)",
            "ENDED": "ended",
            "LEARNED BY": lambda row: ", ".join(row["versions"]),
        },
        none=f"No version learned what {name} no longer says.",
        quiet=lambda row: "\n".join(row["versions"]),
    )


def diff(name: str, before: str, after: str | None = None, /) -> None:
    """Show the entries that two revisions have differently.

    Args:
        name: The memory.
        before: A revision or a named version.
        after: Another; by default the newest revision.
    """
    with opened(name) as store:
        found = store.diff(before, after)
    lines = []
    for one in found:
        lines += [f"- {one.id}  {one.before.text}"] if one.before else []
        lines += [f"+ {one.id}  {one.after.text}"] if one.after else []
    answer(
        [one.to_json() for one in found],
        "\n".join(lines) or "They are the same.",
        quiet="\n".join(one.id for one in found),
    )


def conflicts(name: str, /) -> None:
    """List pairs of entries of which perhaps only one holds: two values where one is possible, or close sentences.

    Args:
        name: The memory.
    """
    with opened(name) as store:
        found = store.conflicts()

    def text() -> str:
        shown = ["\n".join((_side("a", one.a), _side("b", one.b))) for one in found]
        remedy = (
            f"Settle each with nightschool memory resolve {name} {found[0].a.id} {found[0].b.id} --keep a|b|both|merge."
        )
        return "\n\n".join([*shown, remedy])

    answer(
        [one.to_json() for one in found],
        text if found else f"{name} has no conflicts.",
        quiet="\n".join(f"{one.a.id} {one.b.id}" for one in found),
    )


def _side(side: str, entry: MemoryEntry) -> str:
    """One of two entries of which perhaps one holds, and where it comes from."""
    return f"{side}  {entry.id}  {entry.text}" + (f"  (from {entry.source})" if entry.source else "")


def resolve(name: str, a: str, b: str, /, *, keep: Literal["a", "b", "both", "merge"], text: str | None = None) -> None:
    """Settle a conflict.

    Args:
        name: The memory.
        a: An entry, as m12.
        b: The other.
        keep: a or b (the other ends), both (they are not shown again unless one changes), or merge (a says both, b ends).
        text: What the merged entry says; by default both.
    """
    with opened(name) as store:
        change = store.resolve(a, b, keep, author=who(), text=text)
        left = {"a": [a], "b": [b], "both": [a, b], "merge": [a]}[keep]
        stand = "Both stand, and are not shown under conflicts again unless one of them changes."
        answer_change(name, store, change, left, stand if keep == "both" else None)


def relations(
    name: str, relation: str | None = None, cardinality: Literal["single", "multi", "default"] | None = None, /
) -> None:
    """List how many values relations have at a time where it was set, show it of one, or set it for what is written from now on.

    Args:
        name: The memory.
        relation: A relation, as speaks. Without a number of values, what holds for it is shown.
        cardinality: single (a new value takes the place of the old one), multi (it stands beside it), or default.
    """
    with opened(name) as store:
        if relation is not None and cardinality is None:
            holds = store.cardinality_of(relation)
            remedy = f"nightschool memory relations {name} {shlex.quote(relation)} {'multi' if holds == 'single' else 'single'} changes it."
            means = "one value at a time" if holds == "single" else "several values at a time"
            answer({"relation": relation, "cardinality": holds}, f"{relation}: {holds}, {means}. {remedy}", quiet=holds)
            return
        if relation is not None:
            store.set_relation(relation, None if cardinality == "default" else cardinality)
        found = [{"relation": key, "cardinality": value} for key, value in sorted(store.relations().items())]
    answer_rows(
        found,
        {"RELATION": "relation", "VALUES": "cardinality"},
        none=f"No relation was set in {name}; the defaults hold.",
        quiet="relation",
    )
