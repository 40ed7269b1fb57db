"""Which other tenants may ask a fine-tuned model: its owner says so, and may take it back at any moment."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

import sqlalchemy as sa

from nightschool.errors import Conflict, NotFound
from nightschool.events import now
from nightschool.store.database import Database
from nightschool.store.tables import checkpoint_permissions as table

MOST_PROJECTS = 1000
"""That may ask one model."""


@dataclass(frozen=True)
class FineTuned:
    """What a permission is about: a tenant's name in the registry, and the alias that is asked for."""

    tenant: str
    name: str
    pointer: str

    @property
    def ref(self) -> str:
        """As the registry is asked for it."""
        return f"{self.tenant}/{self.name}@{self.pointer}"


@dataclass(frozen=True)
class Permission:
    """That the tenant `project` may ask `name@pointer` of `tenant`."""

    id: str
    tenant: str
    name: str
    pointer: str
    project: str
    created_at: datetime


class CheckpointPermissions:
    """The permissions of a home."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def grant(self, model: FineTuned, projects: Sequence[str]) -> list[Permission]:
        """Let tenants ask a model; who may already keeps its permission.

        Raises:
            Conflict: If more than `MOST_PROJECTS` would.
        """
        with self._db.write(alone_in=table) as connection:
            there = {one.project: one for one in _ls(connection, model)}
            wanted = dict.fromkeys(projects)
            made = [
                Permission("cp_" + secrets.token_hex(12), model.tenant, model.name, model.pointer, project, now())
                for project in wanted
                if project not in there
            ]
            if len(there) + len(made) > MOST_PROJECTS:
                raise Conflict(
                    f"{MOST_PROJECTS} projects may ask one model, which is the most. Delete a permission first."
                )
            if made:
                connection.execute(table.insert(), [asdict(one) for one in made])
        found = there | {one.project: one for one in made}
        return [found[project] for project in wanted]

    def ls(self, model: FineTuned) -> list[Permission]:
        """Who may ask a model, oldest first."""
        with self._db.read() as connection:
            return _ls(connection, model)

    def revoke(self, model: FineTuned, permission_id: str) -> None:
        """Take a permission back, from the next request on. Raises NotFound if the model has none of this id."""
        with self._db.write() as connection:
            gone = connection.execute(table.delete().where(*_of(model), table.c.id == permission_id)).rowcount
        if not gone:
            raise NotFound(f"There is no permission {permission_id[:100]!r} of this model.")

    def allows(self, model: FineTuned, project: str) -> bool:
        """Whether a tenant may ask another's model now."""
        with self._db.read() as connection:
            return (
                connection.execute(sa.select(table.c.id).where(*_of(model), table.c.project == project)).first()
                is not None
            )


def _of(model: FineTuned) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.tenant == model.tenant, table.c.name == model.name, table.c.pointer == model.pointer


def _ls(connection: sa.Connection, model: FineTuned) -> list[Permission]:
    rows = connection.execute(sa.select(table).where(*_of(model)).order_by(table.c.created_at, table.c.id))
    return [Permission(**row._mapping) for row in rows]
