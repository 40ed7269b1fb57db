"""Conversations as applications keep them → conversations that can be learned, by rules whose uses are counted.

A chat log begins with a greeting, holds two messages in a row, and ends with a question that nobody answered. Most chat
templates refuse all of that. What a rule does is counted under its name, so that nothing disappears unseen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from nightschool.data.example import AnswerKey, Example, Message
from nightschool.data.sources.load import without_duplicates

RULES: Mapping[str, str] = {
    "blank_messages": "messages without text were left out",
    "system_moved": "system messages inside of a conversation were moved to its beginning",
    "merged": "messages of one role in a row were joined, with a line break between them",
    "leading_answers": "answers before the first question were left out",
    "unanswered": "messages after the last answer were left out",
    "without_answer": "conversations without a question and an answer were left out",
    "duplicates": "conversations that were there before were left out",
}


@dataclass(frozen=True)
class Repaired:
    """What can be learned, each conversation once, and how often each of `RULES` was used."""

    examples: list[Example]
    repairs: Counter[str] = field(default_factory=Counter)


def repair_conversations(
    conversations: Sequence[Sequence[Message]], source: str, keys: Sequence[AnswerKey] | None = None
) -> Repaired:
    """Bring conversations into the form `system? (user assistant)+`, and leave out what cannot be brought into it.

    Messages of tools stay where they are.

    Args:
        conversations: Their messages; roles were checked before.
        keys: By what each of their last answers is judged, if anything was said about that.
        source: What the examples name as their source; the line is the 1-based number of the conversation.
    """
    repairs: Counter[str] = Counter()
    examples = []
    for number, messages in enumerate(conversations, start=1):
        turns = _repaired(messages, repairs)
        if turns:
            key = keys[number - 1] if keys is not None else AnswerKey()
            examples.append(Example(messages=turns, source=source, line=number, **key._asdict()))
        else:
            repairs["without_answer"] += 1
    unique, duplicates = without_duplicates(examples)
    repairs["duplicates"] += duplicates
    return Repaired(unique, +repairs)


def _repaired(messages: Sequence[Message], repairs: Counter[str]) -> tuple[Message, ...]:
    written = [message for message in messages if message.content.strip()]
    turns = [message for message in written if message.role != "system"]
    system = [message for message in written if message.role == "system"]
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), len(turns))
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < first:
        return ()
    repairs["blank_messages"] += len(messages) - len(written)
    repairs["system_moved"] += sum(message.role == "system" for message in written[len(system) :])
    repairs["leading_answers"] += first
    repairs["unanswered"] += len(turns) - 1 - last
    joined = (*_joined(system), *_joined(turns[first : last + 1]))
    repairs["merged"] += len(system) + last + 1 - first - len(joined)
    return joined


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Messages of one role in a row as one; what several tools returned is not one message."""
    joined: list[Message] = []
    for role, group in groupby(messages, key=lambda message: message.role):
        turns = list(group)
        joined += turns if role == "tool" else [Message(role, "\n".join(turn.content for turn in turns))]
    return joined
