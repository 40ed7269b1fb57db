"""Tenants: every name gets one, and what exists is the default tenant's.

The column `tenant` of conversations used to hold the digest of the key that asked; that is the `owner` now. Cycles
name their process as leases do, by machine, number and beginning; the bare number says nothing any more.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_KEYED = ("accepted_versions", "accepted_examples", "pins", "cycles", "schedules")


def _tenant() -> sa.Column[str]:
    return sa.Column("tenant", sa.String(64), nullable=False, server_default="default")


def upgrade() -> None:
    """Add the columns, and extend every key by them."""
    op.drop_index("ix_conversations_tenant", "conversations")
    op.execute("ALTER TABLE conversations RENAME COLUMN tenant TO owner")
    op.add_column("conversations", _tenant())
    op.create_index("ix_conversations_tenant", "conversations", ["tenant"])
    op.drop_index("ix_pins_name", "pins")
    for table in _KEYED:
        op.add_column(table, _tenant())
    op.create_index("ix_pins_tenant_name", "pins", ["tenant", "name"])
    op.add_column("cycles", sa.Column("owner", sa.String(200)))
    if op.get_bind().dialect.name == "sqlite":
        _rebuild()
    else:
        _alter()


def _alter() -> None:
    op.drop_column("cycles", "pid")
    op.drop_constraint("fk_accepted_examples_name_version", "accepted_examples")
    op.drop_constraint("uq_accepted_examples_name_version_digest", "accepted_examples")
    op.drop_constraint("pk_accepted_versions", "accepted_versions")
    op.drop_constraint("uq_cycles_name_due_at", "cycles")
    op.drop_constraint("pk_schedules", "schedules")
    op.create_primary_key("pk_accepted_versions", "accepted_versions", ["tenant", "name", "version"])
    op.create_foreign_key(
        "fk_accepted_examples_tenant_name_version",
        "accepted_examples",
        "accepted_versions",
        ["tenant", "name", "version"],
        ["tenant", "name", "version"],
    )
    op.create_unique_constraint(
        "uq_accepted_examples_tenant_name_version_digest", "accepted_examples", ["tenant", "name", "version", "digest"]
    )
    op.create_unique_constraint("uq_cycles_tenant_name_due_at", "cycles", ["tenant", "name", "due_at"])
    op.create_primary_key("pk_schedules", "schedules", ["tenant", "name"])


def _rebuild() -> None:
    """SQLite cannot change keys: each table is made again, filled, and the old one dropped, children first."""
    op.drop_index("ix_accepted_examples_origin", "accepted_examples")
    rebuilt = ("accepted_versions", "accepted_examples", "cycles", "schedules")
    for table in rebuilt:
        op.rename_table(table, f"old_{table}")
    op.create_table(
        "accepted_versions",
        _tenant(),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "name", "version", name="pk_accepted_versions"),
    )
    op.create_table(
        "accepted_examples",
        sa.Column("id", sa.Integer(), nullable=False),
        _tenant(),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("origin", sa.String(200)),
        sa.Column("example", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_accepted_examples"),
        sa.ForeignKeyConstraint(
            ["tenant", "name", "version"],
            ["accepted_versions.tenant", "accepted_versions.name", "accepted_versions.version"],
            name="fk_accepted_examples_tenant_name_version",
        ),
        sa.UniqueConstraint(
            "tenant", "name", "version", "digest", name="uq_accepted_examples_tenant_name_version_digest"
        ),
    )
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "cycles",
        sa.Column("id", sa.Integer(), nullable=False),
        _tenant(),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("due_at", moment, nullable=False),
        sa.Column("trigger", sa.String(32), nullable=False),
        sa.Column("owner", sa.String(200)),
        sa.Column("started_at", moment, nullable=False),
        sa.Column("finished_at", moment),
        sa.Column("outcome", sa.String(16)),
        sa.Column("detail", sa.JSON()),
        sa.Column("run_id", sa.String(200)),
        sa.Column("candidate", sa.String(200)),
        sa.Column("data_fingerprint", sa.String(128)),
        sa.PrimaryKeyConstraint("id", name="pk_cycles"),
        sa.UniqueConstraint("tenant", "name", "due_at", name="uq_cycles_tenant_name_due_at"),
    )
    op.create_table(
        "schedules",
        _tenant(),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("paused_at", moment),
        sa.PrimaryKeyConstraint("tenant", "name", name="pk_schedules"),
    )
    for table in rebuilt:
        columns = ", ".join(column["name"] for column in sa.inspect(op.get_bind()).get_columns(table))
        op.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM old_{table}")  # noqa: S608  our own names
    for table in ("old_accepted_examples", "old_accepted_versions", "old_cycles", "old_schedules"):
        op.drop_table(table)
    op.create_index("ix_accepted_examples_origin", "accepted_examples", ["origin"])
