"""Pinned answers: what every candidate must still say, or the gate refuses it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from nightschool.errors import Conflict, NotFound, UsageError
from nightschool.events import now
from nightschool.store.database import Database
from nightschool.store.names import check_full_name, full_name
from nightschool.store.tables import is_name_in, key_of, pins


@dataclass(frozen=True)
class Pin:
    """One question and the answer that must be kept."""

    id: int
    name: str
    question: str
    answer: str
    created_at: datetime


class Pins:
    """The pinned answers of a home."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, name: str, question: str, answer: str) -> Pin:
        """Pin an answer of a name.

        Raises:
            NameRefused: If the name could not be one.
            UsageError: If the question or the answer is blank.
            Conflict: If the question is pinned already; the message names its pin.
        """
        name = check_full_name(name)
        if not question.strip() or not answer.strip():
            raise UsageError(
                f"The pin {question!r} → {answer!r} has a blank side. Write both a question and an answer."
            )
        with self._db.write() as connection:
            for pin in _load(connection, name):
                if pin.question == question:
                    raise Conflict(
                        f"{name!r} has pinned {question!r} already, to {pin.answer!r} (pin {pin.id}). Remove that pin first."
                    )
            moment = now()
            row = key_of(name) | {"question": question, "answer": answer, "created_at": moment}
            key = connection.execute(pins.insert().values(row)).inserted_primary_key
            assert key is not None
        return Pin(key[0], name, question, answer, moment)

    def ls(self, name: str) -> list[Pin]:
        """The pins of a name, oldest first."""
        with self._db.read() as connection:
            return _load(connection, name)

    def remove(self, name: str, pin_id: int) -> None:
        """Remove a pin. Raises NotFound if this name has none of this id."""
        with self._db.write() as connection:
            found = connection.execute(pins.delete().where(*is_name_in(pins, name), pins.c.id == pin_id)).rowcount
            if not found:
                ids = ", ".join(str(pin.id) for pin in _load(connection, name)) or "none"
                raise NotFound(f"{name!r} has no pin {pin_id}. It has {ids}.")


def _load(connection: sa.Connection, name: str) -> list[Pin]:
    rows = connection.execute(sa.select(pins).where(*is_name_in(pins, name)).order_by(pins.c.id))
    return [Pin(row.id, full_name(row.tenant, row.name), row.question, row.answer, row.created_at) for row in rows]
