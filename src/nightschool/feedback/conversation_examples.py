"""Conversations that the server recorded → examples: what a person corrected by day is learned by night."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nightschool.data.example import CONVERSATIONS, Example, Message
from nightschool.data.sources.formats import parse_messages
from nightschool.data.sources.problems import Problems
from nightschool.errors import DataError
from nightschool.feedback.conversations import Conversation


@dataclass(frozen=True)
class ConversationExamples:
    """`bad` counts answers that were rated bad and never corrected, `superseded` those that a later one replaces."""

    examples: list[Example]
    bad: int
    superseded: int


def examples_of(conversations: Iterable[Conversation], problems: Problems) -> ConversationExamples:
    """Turn recorded conversations, which come oldest first, into examples.

    The last answer is the correction where there is one, else the answer as given; earlier answers are context only.
    An answer that was rated bad and not corrected is never learned. Of the same question answered several times in
    the same conversation, the latest counts: a correction of a correction.
    """
    by_question: dict[tuple[Message, ...], Example] = {}
    bad = superseded = 0
    for one in conversations:
        if one.correction is None and one.rating == "bad":
            bad += 1
            continue
        answer = one.answer if one.correction is None else one.correction
        where = f"conversations: {one.request_id}"
        if not answer.strip():
            problems.add(
                f"{where}: the {'answer' if one.correction is None else 'correction'} is blank. Correct it again, or forget it."
            )
            continue
        try:
            turns = parse_messages(list(one.messages))
        except DataError as error:
            problems.add(f"{where}: {error}")
            continue
        question = tuple(Message(turn.role, turn.content, 0.0 if turn.role == "assistant" else 1.0) for turn in turns)
        superseded += by_question.pop(question, None) is not None
        by_question[question] = Example(
            messages=(*question, Message("assistant", answer)),
            id=one.request_id,
            source=CONVERSATIONS,
            corrects=one.answer if one.correction is not None else "",
        )
    return ConversationExamples(list(by_question.values()), bad, superseded)
