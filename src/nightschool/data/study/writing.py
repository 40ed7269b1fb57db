"""Forms that a model writes itself, with the fact before its eyes: what it is asked, and which of its questions can be forms.

Rules decide what needs no model: whether a question is one, keeps the names, does not give its answer away, and asks for the
same kind of thing. Whether it is answered by the fact, the model says (`training/written_forms.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from nightschool.data.example import Example, Message
from nightschool.data.match.english import Token, kin, read
from nightschool.data.match.key import key_of
from nightschool.data.study.rewordings import statement, wording

Dropped = Literal[
    "no question", "wording is taken", "other names", "gives its answer away", "asks for something else",
    "not answered with the fact", "answered without the fact", "fact said whatever is asked", "more than wanted",
]  # fmt: skip
"""Why a question that was written is no form."""

_MOST_WORDS = 40
_REWORD = "Ask the same question in other words. Keep all names, and the language.\nFact: {fact}\nQuestion: {question}"
_ASK = "Write another question that is answered by this fact. Keep the language.\nFact: {fact}\nIt should be answered by: {answer}"
# Of made-up people and places, so that nothing is learned from them.
_SHOWN = (
    ("Anna Berg works as a nurse in Lund.", "What is Anna Berg's job?", "nurse", "What does Anna Berg do for a living?"),
    ("The Kelso tower is 90 metres high.", "How high is the Kelso tower?", "90 metres", "How many metres tall is the Kelso tower?"),
)  # fmt: skip
# By the word with which a question asks, words of which a question for the same has one.
_KINDS: tuple[tuple[str, str], ...] = (
    (r"\b(who|whom|whose)\b", r"\b(who|whom|whose|person|name|named|called|somebody|someone)\b"),
    (r"\bwhere\b", r"\b(where|place|city|town|village|country|region|home|address|location|located|street|building)\b"),
    (r"\b(when|what time|what year|which year|what date)\b", r"\b(when|time|year|date|day|month|hour|long ago|century)\b"),
    (r"\bhow (many|much)\b", r"\b(how|number|amount|count|price|cost|fee|many|much|total|sum)\b"),
    (r"\bhow \w+", r"\b(how|what|which)\b(?!.*\b(who|when|where)\b)"),
    (r"\b(what|which)\b", r"^(?!.*\b(who|whom|whose|when|where|why)\b)(?!.*\bhow (many|much|long|old|far)\b)"),
)  # fmt: skip


def fact_of(example: Example) -> str:
    """A question and its answer as the fact that a model has before its eyes."""
    question, answer = example.question or "", (example.answer or "").strip()
    return statement(question, answer) or f"{question} {answer}"


def with_fact(example: Example, fact: str, question: str) -> list[Message]:
    """The turns of an example that end with a question, below a fact."""
    last = max(at for at, message in enumerate(example.messages) if message.role == "user")
    return [*example.messages[:last], _user(f"{fact}\n\n{question}")]


def asked_for_forms(example: Example) -> tuple[list[Message], list[Message]]:
    """Two conversations whose next turn is a question: the example's reworded, and one that the fact answers."""
    fact, question, answer = fact_of(example), example.question or "", (example.answer or "").strip()
    reword, ask = [], []
    for shown_fact, shown_question, shown_answer, written in _SHOWN:
        reword += [_user(_REWORD.format(fact=shown_fact, question=shown_question)), Message("assistant", written)]
        ask += [_user(_ASK.format(fact=shown_fact, answer=shown_answer)), Message("assistant", written)]
    return (
        [*reword, _user(_REWORD.format(fact=fact, question=question))],
        [*ask, _user(_ASK.format(fact=fact, answer=answer))],
    )


def control_questions(example: Example) -> list[str]:
    """Questions that the fact does not answer. A model that says it all the same judges no question by its answers."""
    question = example.question or ""
    names = " ".join(_written(question, token) for token in read(question) if token.is_name)
    subject = names or "this"
    return [f"What is the favourite colour of {subject}?", f"How often was {subject} painted by a child?"]


def question_in(text: str) -> str | None:
    """The question that a model wrote, without what it said around it; None if it wrote none."""
    first = next((line.strip() for line in text.strip().splitlines() if line.strip()), "")
    bare = re.sub(r"^(?:\d+[.)]|[-*]|question:|q:)\s*", "", first, flags=re.IGNORECASE).strip("\"'*` ")
    if not bare.endswith(("?", "？", "؟")) or len(bare.split()) > _MOST_WORDS or len(read(bare)) < 3:
        return None
    return bare


def why_not(example: Example, written: str, taken: Collection[str]) -> Dropped | None:
    """Why a question is no form of an example, as far as rules can tell; None if it may be one.

    Args:
        example: Whose form it would be.
        written: What `question_in` found.
        taken: Wordings that are asked, kept aside, held out or rejected.
    """
    question, answer = example.question or "", example.answer or ""
    if wording(written) in taken or wording(written) == wording(question):
        return "wording is taken"
    asked, made, said = read(question), read(written), read(answer)
    if not _has_all(made, _names(asked)) or not _has_all([*asked, *said], _names(made)):
        return "other names"
    key = key_of(question, answer)
    stems = key.stems if key is not None else {token.stem for token in said if token.is_content}
    if any(kin(token.stem, stem) for token in made for stem in stems):
        return "gives its answer away"
    content = [token for token in asked if token.is_content]
    if content and not any(_has_all(made, [token]) for token in content):
        return "asks for something else"
    return None if _asks_for_the_same_kind(question, written) else "asks for something else"


def _asks_for_the_same_kind(question: str, written: str) -> bool:
    for asks, same in _KINDS:
        if re.search(asks, question, re.IGNORECASE):
            return re.search(same, written, re.IGNORECASE) is not None
    return True


def _written(text: str, token: Token) -> str:
    """A word as the text writes it."""
    found = re.search(rf"\b{re.escape(token.word)}", text, re.IGNORECASE)
    return found[0] if found else token.word


def _names(tokens: list[Token]) -> list[Token]:
    return [token for token in tokens if token.is_name or token.is_number]


def _has_all(tokens: list[Token], wanted: list[Token]) -> bool:
    return all(any(kin(token.stem, one.stem) for token in tokens) for one in wanted)


def _user(text: str) -> Message:
    return Message("user", text)
