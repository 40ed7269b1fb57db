"""Bring a database to the newest layout, inside the caller's transaction."""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, RevisionStep
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

_FOLDER = Path(__file__).parent


def scripts() -> ScriptDirectory:
    """The migrations of this package."""
    config = Config()
    # A `%` in a path would be read as the beginning of a variable.
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    return ScriptDirectory.from_config(config)


def upgrade(connection: Connection) -> bool:
    """Apply every migration that is missing. Returns False, and changes nothing, if the layout is newer than ours."""
    directory = scripts()
    present = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in directory.walk_revisions()}
    if present is not None and present not in known:
        return False

    def steps(revision: str | tuple[str, ...], _: MigrationContext) -> list[RevisionStep]:
        return directory._upgrade_revs("head", revision)  # type: ignore[arg-type]  # Alembic's own env.py does this

    with EnvironmentContext(Config(), directory, fn=steps) as environment:
        environment.configure(connection=connection, transactional_ddl=True)
        environment.run_migrations()
    return True
