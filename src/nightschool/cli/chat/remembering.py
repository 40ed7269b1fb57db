"""What a correction becomes in a memory: the fact that is proposed, what writing it did, and how it is taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nightschool.cli.output import who
from nightschool.errors import DataError
from nightschool.memory.entry import NewEntry
from nightschool.memory.facts import as_fact, key_of
from nightschool.memory.store import MemoryStore
from nightschool.store.home import Home
from nightschool.store.names import memory_path


@dataclass(frozen=True)
class Remembered:
    """What writing a fact did. `entry` is its id, `superseded` what it said before; `undo` is the command that takes it back.

    `text` is None where the fact said that what the entry had is no longer so, which ended it.
    """

    memory: str
    revision: int
    entry: str
    text: str | None
    superseded: str | None
    is_new: bool
    undo: str

    def to_json(self) -> dict[str, Any]:
        return vars(self)

    def lines(self) -> list[str]:
        """For people."""
        if not self.is_new:
            return [f"{self.memory} has it already as {self.entry}: nothing was written."]
        superseded = "" if self.superseded is None else f" It superseded: {self.superseded}"
        if self.text is None:
            return [
                f"{self.memory} no longer has {self.entry}. It counts for the next message.",
                f"To undo it: {self.undo}",
            ]
        return [
            f"{self.memory} remembers {self.entry}: {self.text} It counts for the next message.{superseded}",
            f"To undo it: {self.undo}",
        ]


def fact_of(correction: str, wrong: str, read: Sequence[str]) -> str | None:
    """The sentence to be remembered of a correction: itself, if it says of whom or what it is, or else what an entry says with it.

    Args:
        correction: The right answer.
        wrong: The answer that was corrected.
        read: The entries that were read for it. The one whose value was answered, or the only one, takes the correction as its value.

    Returns:
        None where no rule tells.
    """
    try:
        said = as_fact(NewEntry(correction))
        if said.subject is not None or said.retracts is not None:
            return correction
        facts = [fact for fact in (as_fact(NewEntry(text)) for text in read) if fact.value is not None]
        answered = [fact for fact in facts if fact.value and key_of(fact.value) in key_of(wrong)]
        chosen = answered if len(answered) == 1 else facts
        if len(chosen) != 1:
            return None
        [fact] = chosen
        value = correction.strip().rstrip(".!").strip()
        return as_fact(NewEntry("", fact.subject, fact.relation, value)).text
    except DataError:
        return None


def remember_here(home: Home, memory: str, text: str, source: str) -> Remembered:
    """Write a fact into a memory of a home.

    Raises:
        NotFound: If there is no such memory.
        DataError: If it is no fact.
    """
    with MemoryStore.open(memory_path(home, memory)) as store:
        change = store.add([NewEntry(text, source=source)], author=who())
        [entry] = change.ids
        versions = [] if change.removed else [one.to_json() for one in store.history(entry)]
    return remembered(memory, change.to_json(), entry, versions, f"nightschool memory undo {memory}")


def remembered(
    memory: str, change: Mapping[str, Any], entry: str, versions: Sequence[Mapping[str, Any]], undo: str
) -> Remembered:
    """What a write did, from what it answered and the history of its entry, which is empty if the fact ended one."""
    is_new = not change["unchanged"]
    before = versions[-2]["text"] if change["superseded"] and len(versions) > 1 else None
    text = versions[-1]["text"] if versions else None
    return Remembered(memory, change["revision"], entry, text, before, is_new, undo)
