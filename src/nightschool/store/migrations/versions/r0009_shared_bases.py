"""Which jobs may share a base, and which do."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add two columns. A job that was queued before has no key, and trains alone."""
    op.add_column("jobs", sa.Column("share_key", sa.String(64)))
    op.add_column("jobs", sa.Column("group_id", sa.String(64)))
