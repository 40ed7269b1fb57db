"""Bring a database to the newest layout, inside the caller's transaction."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

_FOLDER = Path(__file__).parent


def alembic_config() -> Config:
    """The settings under which Alembic finds the migrations of this package."""
    config = Config()
    # A `%` in a path would be read as the beginning of a variable.
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    return config


def upgrade(connection: Connection) -> bool:
    """Apply every migration that is missing. Returns False, and changes nothing, if the layout is newer than ours."""
    config = alembic_config()
    present = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if present is not None and present not in known:
        return False
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return True
