"""`nightschool pins`: answers that every candidate must keep."""

from __future__ import annotations

import dataclasses

from nightschool.cli.output import answer, answer_rows, confirm
from nightschool.feedback.pins import Pins
from nightschool.store.home import Home


def add(question: str, expected: str, /, *, name: str = "default") -> None:
    """Pin a question and its answer: the gate refuses every candidate that no longer gives it.

    Args:
        question: The question, as it is asked.
        expected: The answer that must stay.
        name: The name whose versions must keep it.
    """
    pin = Pins(Home.find().database).add(name, question, expected)
    answer(dataclasses.asdict(pin), f"Pinned for {name} as {pin.id}: {question} → {expected}", quiet=str(pin.id))


def ls(*, name: str = "default") -> None:
    """List the pinned answers of a name.

    Args:
        name: The name.
    """
    pins = Pins(Home.find().database).ls(name)
    answer_rows(
        [dataclasses.asdict(pin) for pin in pins],
        {"PIN": "id", "QUESTION": "question", "ANSWER": "answer"},
        none=f"Nothing is pinned for {name}. Pin an answer with nightschool pins add QUESTION ANSWER.",
        quiet="id",
    )


def rm(pin: int, /, *, name: str = "default", yes: bool = False) -> None:
    """Unpin an answer.

    Args:
        pin: Its number in `pins ls`.
        name: The name.
        yes: Do not ask.
    """
    pins = Pins(Home.find().database)
    found = next((one for one in pins.ls(name) if one.id == pin), None)
    if found is not None:
        confirm(f"Unpin {found.question!r} → {found.answer!r}?", yes=yes)
    pins.remove(name, pin)
    answer({"removed": pin}, f"Unpinned {pin}.", quiet=str(pin))
