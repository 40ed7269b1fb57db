"""What an edit makes of an entry."""

from __future__ import annotations

from datetime import datetime
from enum import Enum

from nightschool.errors import UsageError
from nightschool.memory.entry import MemoryEntry, NewEntry, micros_of
from nightschool.memory.facts import Fact


class Keep(Enum):
    """That something stays as it is, where None means something else."""

    KEEP = "keep"


KEEP = Keep.KEEP


def edited(
    old: MemoryEntry,
    *,
    text: str | None,
    value: str | None,
    source: str | None,
    valid_from: datetime | Keep | None,
    valid_to: datetime | Keep | None,
) -> NewEntry:
    """The entry with what was given in place of what it said.

    Raises:
        UsageError: If nothing is given, both text and value, or a value for a sentence without subject and relation.
    """
    if text is None and value is None and source is None and valid_from is KEEP and valid_to is KEEP:
        raise UsageError(f"Nothing of {old.id} is to change. Give a new text, value, source or period.")
    if text is not None and value is not None:
        raise UsageError("Give a new text or a new value, not both: the text states the value.")
    if text is None and old.damaged:
        raise UsageError(f"{old.damage} Only its whole text can take the place of what it says.")
    if value is not None and old.subject is None:
        raise UsageError(f"{old.id} has no subject and relation whose value could change. Give its new text.")
    begin = old.valid_from if isinstance(valid_from, Keep) else valid_from
    end = old.valid_to if isinstance(valid_to, Keep) else valid_to
    if text is not None:
        return NewEntry(text, source=source or "", valid_from=begin, valid_to=end)
    if value is not None:
        return NewEntry("", old.subject, old.relation, value, source or "", begin, end)
    kept = old.source if source is None else source
    wording = old.text if old.subject is None else old.wording or ""
    return NewEntry(wording, old.subject, old.relation, old.value, kept, begin, end)


def is_unchanged(old: MemoryEntry, fact: Fact) -> bool:
    """Whether an edit would say what the entry says already."""
    kept = (old.text, old.subject, old.relation, old.value, micros_of(old.valid_from), micros_of(old.valid_to))
    new = (fact.text, fact.subject, fact.relation, fact.value, fact.valid_from, fact.valid_to)
    return kept == new and fact.source in ("", old.source) and not old.damaged
