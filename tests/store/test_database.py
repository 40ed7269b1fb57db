"""Opening the state database: new, up to date, newer than we are, damaged, full, and by many at once."""

import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import OperationalError

from nightschool.errors import Conflict, Damaged, DiskFull, Locked, MadeByNewer, UsageError
from nightschool.events import now
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.pins import Pins
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.store import database as module
from nightschool.store.database import HEAD, Database
from nightschool.store.home import Home
from nightschool.store.home_file import id_of
from nightschool.store.ledger import Ledger
from nightschool.store.migrations.upgrade import alembic_config
from nightschool.store.tables import forgotten, metadata, pins, schedules
from tests.support.crash_points import kill_everywhere
from tests.support.store_databases import db, environment, old_database, postgres, postgres_url  # noqa: F401


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def types_differ(context, _column, _wanted_column, inspected, wanted):
    """SQLite holds no text to its length, so migrations leave the lengths there as they were."""
    both_text = isinstance(inspected, sa.String) and isinstance(wanted, sa.String)
    return False if context.dialect.name == "sqlite" and both_text else None


def test_migrations_make_exactly_the_tables(db):  # noqa: F811
    with db.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": types_differ})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == HEAD
    assert ScriptDirectory.from_config(alembic_config()).get_heads() == [HEAD]


def test_opening_again_imports_neither_alembic_nor_torch(home):
    Database(home, env={}).connect().close()
    code = (
        "import sys; from pathlib import Path; from nightschool.store.home import Home;"
        "from nightschool.store.database import Database; Database(Home(Path(sys.argv[1])), env={}).connect();"
        "assert 'alembic' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, home.path], check=True)


def test_what_is_named_without_need_imports_no_sqlalchemy():
    code = "import sys, nightschool.store, nightschool.store.registry, nightschool.store.runs; assert 'sqlalchemy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_what_can_be_found_out_again_is_spared_the_wait_for_the_disk(db):  # noqa: F811
    question, kept, spared = {
        "sqlite": ("PRAGMA synchronous", 2, 1),
        "postgresql": ("SHOW synchronous_commit", "on", "off"),
    }[db.engine.dialect.name]
    for durable, expected in [(True, kept), (False, spared), (True, kept)]:
        with db.write(durable=durable) as connection:
            assert connection.exec_driver_sql(question).scalar() == expected
    with db.write() as connection:
        assert connection.exec_driver_sql(question).scalar() == kept


def test_many_open_a_new_database_at_once(home, environment):  # noqa: F811
    code = (
        "import sys; from pathlib import Path; from nightschool.store.home import Home;"
        "from nightschool.store.database import Database; from nightschool.feedback.pins import Pins;"
        "print('ready', flush=True); sys.stdin.readline(); Pins(Database(Home(Path(sys.argv[1]))).connect()).add('bot', sys.argv[2], 'a')"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, home.path, f"q{index}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
        )
        for index in range(4)
    ]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 4
    with Database(home, env=environment).connect() as database, database.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(pins)).scalar() == 4


def test_a_new_database_that_another_writes_to_at_this_moment_is_waited_for(home):
    home.ensure()
    other = sqlite3.connect(home.state_db, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    end = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    end.start()
    with Database(home, env={}).connect() as database:
        Pins(database).add("bot", "q", "a")
    end.join()
    other.close()


def test_a_migration_that_is_killed_anywhere_is_done_by_the_next(home):
    home.ensure()

    def work():
        Database(home, env={}).connect().close()

    for _ in kill_everywhere(work):
        if home.state_db.exists():
            connection = sa.create_engine(f"sqlite:///{home.state_db}")
            assert sa.inspect(connection).get_table_names() in ([], sorted([*metadata.tables, "alembic_version"]))
            connection.dispose()
    work()


def test_a_database_of_a_newer_nightschool_is_refused(home, environment):  # noqa: F811
    with Database(home, env=environment).connect() as database, database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Conflict, match=rf"newer nightschool \(layout 9999\); this one knows {HEAD}"):
        Database(home, env=environment).connect()


@pytest.mark.parametrize("content", [b"this is not a database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_database_is_named(home, content):
    home.ensure()
    home.state_db.write_bytes(content)
    with pytest.raises(Damaged, match=r"state\.db is damaged"):
        Database(home, env={}).connect()


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("mysql://u:secret@host/db", "kind 'mysql', but nightschool keeps its state in sqlite or postgresql"),
        ("secret-nonsense", "is not a database address"),
    ],
)
def test_other_addresses_are_refused_without_their_password(home, url, match):
    with pytest.raises(UsageError, match=match) as raised:
        Database(home, env={"DATABASE_URL": url}).connect()
    assert "secret" not in str(raised.value)


def test_a_missing_driver_says_how_to_install_it(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UsageError, match=r"pip install 'nightschool\[postgres\]'"):
        Database(home, env={"DATABASE_URL": "postgres://u@h/d"}).connect()


def test_a_block_is_stored_whole_or_not_at_all(db):  # noqa: F811
    with db.write() as connection:
        connection.execute(schedules.insert().values(name="kept"))

    def fail():
        with db.write() as connection:
            connection.execute(schedules.insert().values(name="lost"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with db.read() as connection:
        assert connection.execute(sa.select(schedules.c.name)).scalars().all() == ["kept"]


def test_readers_do_not_wait_for_a_writer(db):  # noqa: F811
    with db.write() as writer:
        writer.execute(schedules.insert().values(name="new"))
        with db.read() as reader:
            assert reader.execute(sa.select(schedules.c.name)).all() == []


def test_a_full_disk(home):
    with Database(home, env={}).connect() as database:
        with database.write() as connection:
            connection.execute(schedules.insert().values(name="kept"))
        with database.read() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        sa.event.listen(database.engine, "begin", lambda c: c.exec_driver_sql(f"PRAGMA max_page_count = {pages}"))
        rows = [{"name": f"{index:064d}"} for index in range(1000)]
        with pytest.raises(DiskFull, match="Free some space"), database.write() as connection:
            connection.execute(schedules.insert(), rows)
        with database.read() as connection:
            assert connection.execute(sa.select(schedules.c.name)).scalars().all() == ["kept"]


def test_a_writer_that_does_not_end(home, monkeypatch):
    monkeypatch.setattr(module, "_BUSY_SECONDS", 0.1)
    with Database(home, env={}).connect() as one, Database(home, env={}).connect() as two:
        with one.write(), pytest.raises(Locked, match="Another process has been writing"), two.write():
            raise AssertionError("not reached")
        with two.write():
            pass


def test_threads_that_read_and_then_write_lose_no_update(db):  # noqa: F811
    with db.write() as connection:
        connection.execute(pins.insert().values(name="n", question=0, answer=0, created_at=now()))

    def increment(_):
        with db.write() as connection:
            value = connection.execute(sa.select(pins.c.question).with_for_update()).scalar()
            connection.execute(pins.update().values(question=value + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(increment, range(40)))
    with db.read() as connection:
        assert connection.execute(sa.select(pins.c.question)).scalar() == 40


def test_what_is_forgotten_is_overwritten_while_the_database_is_open(home):
    def on_disk():
        return b"".join(path.read_bytes() for path in home.path.glob("state.db*"))

    with Database(home, env={}).connect() as database, Database(home, env={}).connect():
        store = ConversationStore(database)
        store.record("r0", "bot", "v", [{"role": "user", "content": "my secret"}], "answer")
        assert b"my secret" in on_disk()
        store.forget("r0")
        assert b"my secret" not in on_disk()
        store.record("r1", "bot", "v", [], "answer")
        with database.read() as reader:
            reader.execute(sa.select(forgotten)).all()
            store.forget("r1")  # A reader that stays delays the overwriting, not the forgetting.
        assert store.select() == []


def test_an_old_database_is_brought_up_to_date_with_what_it_holds(home, environment):  # noqa: F811
    old_database(home, environment, "0001", "INSERT INTO schedules (name) VALUES ('kept')")
    with Database(home, env=environment).connect() as database, database.read() as connection:
        assert connection.execute(sa.select(schedules.c.name)).scalars().all() == ["kept"]
        assert connection.execute(sa.select(forgotten)).all() == []
        context = MigrationContext.configure(connection, opts={"compare_type": types_differ})
        assert compare_metadata(context, metadata) == []


LONGEST_NAME = "n" * 64
LONG_PATH = "/models/" + "deep/" * 100


def test_long_names_and_paths_are_kept_on_every_server(db):  # noqa: F811
    store = ConversationStore(db)
    store.record("r1", LONGEST_NAME, "20261121_060000", [{"role": "user", "content": "?"}], "!")
    store.record("r2", "local", LONG_PATH, [{"role": "user", "content": "?"}], "!", owner="t" * 128)
    assert (store.get("r1").model, store.get("r2").version) == (LONGEST_NAME, LONG_PATH)
    ledger = Ledger(db)
    run_id, ref = f"{LONGEST_NAME}-20261121_060000", f"{LONGEST_NAME}@20261121_060000"
    cycle = ledger.begin(LONGEST_NAME, now(), "start")
    assert ledger.finish(cycle, "promoted", run_id=run_id, candidate=ref).candidate == ref


def test_versions_that_were_kept_with_their_name_are_kept_without_it(home, environment):  # noqa: F811
    old_database(
        home,
        environment,
        "0002",
        *(
            "INSERT INTO conversations (request_id, recorded_at, model, version, messages, answer) VALUES "
            f"('{request_id}', '2026-11-21 06:00:00', '{name}', '{version}', '[]', '\"!\"')"
            for request_id, name, version in (
                ("r1", "bot", "bot@20261121_060000"),
                ("r2", "bot", "20261121_060000"),
                ("r3", "local", "./some@folder"),
            )
        ),
    )
    with Database(home, env=environment).connect() as database:
        versions = [one.version for one in ConversationStore(database).select()]
    assert versions == ["20261121_060000", "20261121_060000", "./some@folder"]


ROWS_OF_0004 = (
    "INSERT INTO conversations (request_id, recorded_at, model, version, tenant, messages, answer) VALUES "
    "('r1', '2026-11-21 06:00:00', 'bot', '20261121_060000', 'digest of a key', '[]', '\"!\"')",
    "INSERT INTO feedback (id, request_id, recorded_at, rating) VALUES (7, 'r1', '2026-11-21 07:00:00', 'good')",
    "INSERT INTO accepted_versions (name, version, active) VALUES ('bot', '20261121_060000', true)",
    "INSERT INTO accepted_examples (id, name, version, digest, origin, example) "
    "VALUES (3, 'bot', '20261121_060000', 'd', 'r1', '{\"text\": \"a plain text\"}')",
    "INSERT INTO pins (id, name, question, answer, created_at) "
    "VALUES (2, 'bot', '\"q\"', '\"a\"', '2026-11-21 06:00:00')",
    "INSERT INTO cycles (id, name, due_at, trigger, pid, started_at, outcome) "
    "VALUES (5, 'bot', '2026-11-21 06:00:00', 'due', 12, '2026-11-21 06:00:00', 'promoted')",
    "INSERT INTO schedules (name, paused_at) VALUES ('bot', '2026-11-21 08:00:00')",
)


def test_what_exists_becomes_the_default_tenants(home, environment):  # noqa: F811
    old_database(home, environment, "0004", *ROWS_OF_0004)
    with Database(home, env=environment).connect() as database:
        (conversation,) = ConversationStore(database).select(model="bot")
        assert (conversation.owner, conversation.rating) == ("digest of a key", "good")
        assert AcceptedExamples(database).digests("bot") == {"d"}
        assert [pin.id for pin in Pins(database).ls("bot")] == [2]
        ledger = Ledger(database)
        assert [(cycle.id, cycle.name, cycle.owner) for cycle in ledger.ls("bot")] == [(5, "bot", None)]
        assert ledger.paused("bot")
        # What another tenant calls the same is another one.
        assert (Pins(database).ls("acme/bot"), ledger.ls("acme/bot"), ledger.paused("acme/bot")) == ([], [], False)
        assert AcceptedExamples(database).digests("acme/bot") == set()
        # The keys work: every one of these would collide with the default tenant's row.
        AcceptedExamples(database).add("acme/bot", "20261121_060000", [{"text": "another"}])
        ledger.begin("acme/bot", conversation.time, "due")
        ledger.pause("acme/bot")
        assert ledger.names() == ["acme/bot", "bot"]
        with database.read() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": types_differ})
            assert compare_metadata(context, metadata) == []


def test_two_homes_on_one_postgresql_do_not_meet(tmp_path, postgres_url):  # noqa: F811
    on_postgresql = {"DATABASE_URL": postgres_url}
    homes = [Home(tmp_path / name) for name in ("one", "two")]
    for home in homes:
        with Database(home, env=on_postgresql).connect() as database:
            Pins(database).add("bot", "q", f"of {home.path.name}")
    for home in homes:
        with Database(home, env=on_postgresql).connect() as database:
            assert [pin.answer for pin in Pins(database).ls("bot")] == [f"of {home.path.name}"]


def test_a_lone_home_takes_its_tables_with_it_on_postgresql(tmp_path, home, postgres_url):  # noqa: F811
    on_postgresql = {"DATABASE_URL": postgres_url}
    old_database(home, on_postgresql, "0004", *ROWS_OF_0004)
    with Database(Home(tmp_path / "unused"), env=on_postgresql).connect() as database:
        assert Pins(database).ls("bot") == []
    with Database(home, env=on_postgresql).connect() as database:
        assert [pin.id for pin in Pins(database).ls("bot")] == [2]
        assert Pins(database).add("bot", "another", "a").id == 1  # the sequence moved along, too


def test_tables_that_several_homes_share_are_given_to_none(home, postgres_url):  # noqa: F811
    on_postgresql = {"DATABASE_URL": postgres_url}
    upload = (
        "INSERT INTO uploads (home, path, url, run_id, name, step, digest, archive, size_bytes, state, attempts, "
        "next_try_at, queued_at) VALUES ('/other/home', '/p', 'file:///u', 'r', 'n', 1, 'd', false, 1, 'done', 1, "
        "now(), now())"
    )
    old_database(home, on_postgresql, "0004", upload)
    for _ in range(2):
        with pytest.raises(Conflict, match="rows of this home and of /other/home"):
            Database(home, env=on_postgresql).connect()


def test_a_home_of_a_newer_form_is_refused(home):
    Database(home, env={}).connect().close()
    file = home.path / "home.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(MadeByNewer, match="has the form 2 of a newer nightschool; this one knows 1"):
        Database(home, env={}).connect()
    file.write_text('{"format": 1, "id": "../x"}')
    with pytest.raises(Damaged, match=r"home\.json is damaged"):
        Database(home, env={}).connect()


def test_the_id_of_a_home_is_given_out_once(home):
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: id_of(home), range(8)))) == 1


@pytest.mark.parametrize("said", ["attempt to write a readonly database", "unable to open database file"])
def test_a_home_that_cannot_be_written_is_no_mistake_of_ours(tmp_path, said):
    refused = pytest.raises(Conflict, match="the home is read-only, or belongs to another user")
    with Database(Home(tmp_path)).connect() as database, refused, database.write():
        raise OperationalError("INSERT", {}, sqlite3.OperationalError(said))
