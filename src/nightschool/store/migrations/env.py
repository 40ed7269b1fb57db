"""What Alembic runs around the migrations: on the connection that it is handed, inside the caller's transaction."""

from __future__ import annotations

from alembic import context

from nightschool.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
