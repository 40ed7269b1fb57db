"""Which rows of data are copies of a conversation: by the id that it was selected by, or because they say the same.

A tenant may have sent a conversation back as data of a job or as a file, where no id tells what it was. A row is a copy if it has
all turns of the conversation, one after the other; the system's words are not compared, nor is space around a turn. A row
that was selected from another conversation is a copy of that one alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nightschool.data.example import Example, Message
from nightschool.data.sources.formats import parse_messages, to_examples
from nightschool.data.sources.rows import Row
from nightschool.errors import DataError
from nightschool.feedback.conversations import Conversation
from nightschool.feedback.replay_pool import origin_of
from nightschool.store.atomic import write_bytes


class Wanted(Protocol):
    """Something that is looked for in examples."""

    def is_in(self, example: Example) -> bool:
        """Whether an example has it."""
        ...

    def candidates(self, content: bytes) -> Iterable[bytes]:
        """The lines of JSON among these that may have it; all that do are among them."""
        ...


_BLOCK_BYTES = 8 << 20
Turns = tuple[tuple[str, str], ...]
ReadRow = Callable[[dict[str, object]], Sequence[Example]]


@dataclass(frozen=True)
class Sought:
    """A conversation that is looked for: its id, and its turns with each answer that it has, as given and as corrected."""

    request_id: str
    versions: tuple[Turns, ...]

    @classmethod
    def of(cls, conversation: Conversation, *, by_content: bool) -> Sought:
        """`by_content`: also what says the same; else only what was selected by the id."""
        try:
            asked = _turns(parse_messages(list(conversation.messages)))
        except DataError:
            asked = ()
        answers = dict.fromkeys(
            answer.strip() for answer in (conversation.answer, conversation.correction) if answer and answer.strip()
        )
        if not asked or not by_content:  # an answer alone says nothing of who was answered
            return cls(conversation.request_id, ())
        return cls(
            conversation.request_id, tuple((*asked, ("assistant", answer)) for answer in answers) if asked else ()
        )

    def candidates(self, content: bytes) -> Iterable[bytes]:
        """All lines."""
        return content.splitlines()

    def is_in(self, example: Example) -> bool:
        """Whether an example is a copy."""
        origin = origin_of(example)
        if origin is not None:
            return origin == self.request_id
        last = Message("assistant", example.rejected)
        said = [example.messages, (*example.messages[:-1], last)] if example.rejected else [example.messages]
        return any(_contains(_turns(messages), wanted) for messages in said for wanted in self.versions)


def rows_of_runs(row: dict[str, object]) -> list[Example]:
    """A row as a run keeps it."""
    return [Example.from_json(row)]


def rows_of_tenants(row: dict[str, object]) -> list[Example]:
    """A row as a tenant sent it, in whatever format; nothing if it is none that could be trained on."""
    try:
        return to_examples(Row(row, "", 0))
    except DataError:
        return []


def holds(path: Path, sought: Wanted, read: ReadRow) -> bool:
    """Whether a file of JSON lines, if it is there, has a copy, or whatever else is looked for."""
    lines = (line for block in _blocks(path) for line in sought.candidates(block) if line.strip())
    return any(sought.is_in(example) for line in lines for example in read(json.loads(line)))


def cut(path: Path, sought: Sought, read: ReadRow) -> int:
    """Take the copies out of a file of JSON lines; returns how many rows it has left. Without a copy it stays as it is."""
    kept, cut_any = [], False
    for line, is_copy in _lines(path, sought, read):
        if is_copy:
            cut_any = True
        else:
            kept.append(line)
    if cut_any:
        write_bytes(path, b"".join(kept))
    return sum(1 for line in kept if line.strip())


def _lines(path: Path, sought: Wanted, read: ReadRow) -> Iterator[tuple[bytes, bool]]:
    """The lines of a file, and whether each is a copy; none where there is no such file."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                yield line, bool(line.strip()) and any(sought.is_in(example) for example in read(json.loads(line)))


def _blocks(path: Path) -> Iterator[bytes]:
    """A file in parts of whole lines; none where there is no such file."""
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block + file.readline()


def _turns(messages: Sequence[Message]) -> Turns:
    return tuple((turn.role, turn.content.strip()) for turn in messages if turn.role != "system")


def _contains(turns: Turns, wanted: Turns) -> bool:
    return any(turns[at : at + len(wanted)] == wanted for at in range(len(turns) - len(wanted) + 1))
