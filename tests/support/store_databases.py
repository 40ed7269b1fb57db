"""The state database on both kinds of server: `db` runs a test on SQLite, and on PostgreSQL where it is installed."""

import pytest
import sqlalchemy as sa
from alembic import command
from benchmarks.postgres import is_installed, postgres_cluster

from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.migrations.upgrade import alembic_config


@pytest.fixture(scope="session")
def postgres():
    """The address of an empty cluster on a socket of its own; skips where PostgreSQL or its driver is missing."""
    if not is_installed():
        pytest.skip("PostgreSQL or psycopg is not installed")
    with postgres_cluster() as address:
        yield address


@pytest.fixture
def postgres_url(postgres, request):
    """A database of its own for one test, empty."""
    import psycopg

    name = f"t{abs(hash(request.node.nodeid))}"
    with psycopg.connect(postgres.format(database="postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield postgres.format(database=name)
    with psycopg.connect(postgres.format(database="postgres"), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def environment(request):
    """The environment under which `Database` connects to that kind."""
    return {} if request.param == "sqlite" else {"DATABASE_URL": request.getfixturevalue("postgres_url")}


@pytest.fixture
def db(environment, tmp_path):
    with Database(Home(tmp_path / "home"), env=environment).connect() as database:
        yield database


def old_database(home, environment, revision, *statements):
    """A state database as an older nightschool left it, at one of the earlier layouts, with rows in it.

    On PostgreSQL it had no schema of its own, and the home was used.
    """
    home.ensure()
    (home.runs / "removed.json").write_text('{"run_ids": []}')
    url = environment.get("DATABASE_URL", f"sqlite:///{home.state_db}").replace("postgresql:", "postgresql+psycopg:")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()
