"""Forms that a person rejected: wordings that are wrong, or ask something else, and are never made again for their name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from nightschool.data.study.forms import form_id
from nightschool.data.study.rewordings import wording
from nightschool.errors import NotFound, UsageError
from nightschool.events import now
from nightschool.store import audit
from nightschool.store.database import Database
from nightschool.store.names import check_full_name, split_name
from nightschool.store.tables import is_name_in, key_of, rejected_forms


@dataclass(frozen=True)
class RejectedForm:
    """A wording that is not made again. `form` is the id that the folders of runs list it by."""

    form: str
    question: str
    rejected_at: datetime
    rejected_by: str


class RejectedForms:
    """The rejected forms of a home, by the names whose examples they were forms of."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, name: str, question: str, *, by: str) -> RejectedForm:
        """Reject a wording; once more changes nothing.

        Raises:
            NameRefused: If the name could not be one.
            UsageError: If the wording has no word.
        """
        name = check_full_name(name)
        if not wording(question):
            raise UsageError(f"{question!r} has no word, and so is no form. Write its question, or its id.")
        form = form_id(question)
        with self._db.write() as connection:
            there = connection.execute(_query(name).where(rejected_forms.c.form == form)).first()
            if there is not None:
                return _read(there)
            made = RejectedForm(form, question, now(), by)
            connection.execute(rejected_forms.insert().values(**key_of(name), **vars(made)))
            audit.note(connection, "form.reject", f"{name} {form}", tenant=split_name(name)[0], by=by)
        return made

    def remove(self, name: str, form: str, *, by: str) -> None:
        """Let a form be made again. Raises NotFound if this name has rejected none of this id."""
        with self._db.write() as connection:
            mine = (*is_name_in(rejected_forms, name), rejected_forms.c.form == form)
            if not connection.execute(rejected_forms.delete().where(*mine)).rowcount:
                raise NotFound(
                    f"{name!r} has not rejected the form {form}. See nightschool data rejected --name {name}."
                )
            audit.note(connection, "form.restore", f"{name} {form}", tenant=split_name(name)[0], by=by)

    def ls(self, name: str) -> list[RejectedForm]:
        """The rejected forms of a name, oldest first."""
        with self._db.read() as connection:
            return [_read(row) for row in connection.execute(_query(name))]

    def wordings(self, name: str) -> frozenset[str]:
        """What no form of this name's examples may ask, as `wording` has it."""
        return frozenset(wording(one.question) for one in self.ls(name))

    def forget(self, tenant: str, wordings: Collection[str]) -> None:
        """Delete what was rejected of examples that are deleted: its text is theirs."""
        mine = rejected_forms.c.tenant == tenant
        with self._db.write() as connection:
            for row in connection.execute(sa.select(rejected_forms).where(mine)).all():
                if wording(row.question) in wordings:
                    here = (mine, rejected_forms.c.name == row.name, rejected_forms.c.form == row.form)
                    connection.execute(rejected_forms.delete().where(*here))


def _query(name: str) -> sa.Select[tuple[object, ...]]:
    mine = is_name_in(rejected_forms, name)
    return sa.select(rejected_forms).where(*mine).order_by(rejected_forms.c.rejected_at, rejected_forms.c.form)


def _read(row: sa.Row[tuple[object, ...]]) -> RejectedForm:
    return RejectedForm(row.form, row.question, row.rejected_at, row.rejected_by)
