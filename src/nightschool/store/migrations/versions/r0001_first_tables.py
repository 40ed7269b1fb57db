"""Conversations and feedback, accepted examples, pins, the ledger of cycles."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create the first tables."""
    op.create_table(
        "conversations",
        sa.Column("request_id", sa.String(200), nullable=False),
        sa.Column("recorded_at", _MOMENT, nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64)),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_conversations"),
    )
    for column in ("recorded_at", "model", "tenant"):
        op.create_index(f"ix_conversations_{column}", "conversations", [column])
    op.create_table(
        "feedback",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.String(200), nullable=False),
        sa.Column("recorded_at", _MOMENT, nullable=False),
        sa.Column("rating", sa.String(8)),
        sa.Column("correction", sa.JSON()),
        sa.PrimaryKeyConstraint("id", name="pk_feedback"),
        sa.ForeignKeyConstraint(
            ["request_id"], ["conversations.request_id"], name="fk_feedback_request_id", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_feedback_request_id", "feedback", ["request_id"])
    op.create_table(
        "accepted_versions",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("name", "version", name="pk_accepted_versions"),
    )
    op.create_table(
        "accepted_examples",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("origin", sa.String(200)),
        sa.Column("example", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_accepted_examples"),
        sa.ForeignKeyConstraint(
            ["name", "version"],
            ["accepted_versions.name", "accepted_versions.version"],
            name="fk_accepted_examples_name_version",
        ),
        sa.UniqueConstraint("name", "version", "digest", name="uq_accepted_examples_name_version_digest"),
    )
    op.create_index("ix_accepted_examples_origin", "accepted_examples", ["origin"])
    op.create_table(
        "pins",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("question", sa.JSON(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_pins"),
    )
    op.create_index("ix_pins_name", "pins", ["name"])
    op.create_table(
        "cycles",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("due_at", _MOMENT, nullable=False),
        sa.Column("trigger", sa.String(32), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("started_at", _MOMENT, nullable=False),
        sa.Column("finished_at", _MOMENT),
        sa.Column("outcome", sa.String(16)),
        sa.Column("detail", sa.JSON()),
        sa.Column("run_id", sa.String(100)),
        sa.Column("candidate", sa.String(100)),
        sa.Column("data_fingerprint", sa.String(128)),
        sa.PrimaryKeyConstraint("id", name="pk_cycles"),
        sa.UniqueConstraint("name", "due_at", name="uq_cycles_name_due_at"),
    )
    op.create_table(
        "schedules",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("paused_at", _MOMENT),
        sa.PrimaryKeyConstraint("name", name="pk_schedules"),
    )
