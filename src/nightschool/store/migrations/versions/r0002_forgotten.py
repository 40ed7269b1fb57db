"""Request ids that were forgotten: files of old runs may still hold their examples, and must not bring them back."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table of tombstones."""
    op.create_table(
        "forgotten",
        sa.Column("request_id", sa.String(200), nullable=False),
        sa.Column("forgotten_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_forgotten"),
    )
