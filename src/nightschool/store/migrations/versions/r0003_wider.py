"""Wider columns: PostgreSQL refuses a name, a path or a hub id that SQLite keeps at any length.

The column `version` of conversations holds where a model came from that has no version, which may be a long path.
Local chats used to keep `name@id` there, and servers the id; the id is what stays.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_WIDER: dict[str, dict[str, sa.types.TypeEngine[str]]] = {
    "conversations": {"model": sa.String(200), "version": sa.Text(), "tenant": sa.String(200)},
    "cycles": {"run_id": sa.String(200), "candidate": sa.String(200)},
}


def upgrade() -> None:
    """Widen the columns, and keep one form of a version."""
    connection = op.get_bind()
    # SQLite holds texts to no length, and altering a table there would mean copying it.
    if connection.dialect.name != "sqlite":
        for table, columns in _WIDER.items():
            for name, kind in columns.items():
                op.alter_column(table, name, type_=kind)
    conversations = sa.table("conversations", sa.column("model", sa.String), sa.column("version", sa.String))
    prefix = conversations.c.model + "@"
    connection.execute(
        conversations.update()
        .where(sa.func.substr(conversations.c.version, 1, sa.func.length(prefix)) == prefix)
        .values(version=sa.func.substr(conversations.c.version, sa.func.length(prefix) + 1))
    )
