"""A home on a read-only mount, or of another user: what only looks works, what writes says why it cannot."""

import json
import os
import subprocess
import sys

import pytest

from nightschool.feedback.pins import Pins
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.ledger import Ledger
from nightschool.store.registry import Registry
from tests.support.cli_home import MORNING, add_version, make_run

LOOKS = (["pins", "ls"], ["schedule", "ls"], ["models", "ls"], ["runs", "ls"], ["uploads", "ls"])
# Prints what each command line of the first argument returned and said, as JSON.
SCRIPT = """
import contextlib, io, json, sys
from nightschool.cli.main import main
answers = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""
MOUNT = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


def in_read_only(home, commands):
    """What command lines answer to whoever cannot write the home: a mount of their own, or else without the right."""
    words = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    mounted = ["unshare", "-m", "sh", "-c", MOUNT, str(home.path)]
    if subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        subprocess.run(["chmod", "-R", "a-w", str(home.path)], check=True)
        mounted = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    done = subprocess.run([*mounted, *words], capture_output=True, text=True, check=True, cwd=home.path.parent)
    return json.loads(done.stdout)


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = Home(tmp_path / "home").ensure()
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(home.path))
    make_run(home)
    for text in ("old", "new"):
        Registry(home).promote("bot", add_version(home, text=text).id, by="test")
    return home


def kept(home, db):
    Pins(db).add("bot", "Who are you?", "A bot.")
    Ledger(db).begin("bot", MORNING, "due")


def test_what_only_looks_works_and_what_writes_says_why_not(home):
    with Database(home).connect() as db:
        kept(home, db)
    before = sorted(home.path.rglob("*"))
    writes = (["pins", "add", "Q?", "A."], ["models", "rollback", "bot"], ["schedule", "pause", "bot"])
    *looked, pinned, added, rolled_back, paused = in_read_only(home, [*LOOKS, ["pins", "ls", "--name", "bot"], *writes])
    for code, _, err in looked:
        assert (code, err) == (0, "")
    assert "bot: no scheduler is running" in looked[1][1]
    assert "bot" in looked[2][1]
    assert "A bot." in pinned[1]
    for code, _, err in (added, rolled_back, paused):
        assert code == 1
        assert "NIGHTSCHOOL_HOME" in err
        assert "mistake of nightschool" not in err
    assert sorted(home.path.rglob("*")) == before


def test_what_a_writer_elsewhere_has_just_stored_is_seen(home):
    with Database(home).connect() as db:
        kept(home, db)
        assert (home.path / "state.db-wal").stat().st_size > 0
        [[code, out, err]] = in_read_only(home, [["pins", "ls", "--name", "bot"]])
    assert (code, err) == (0, "")
    assert "A bot." in out


def test_without_a_database_nothing_is_kept_and_nothing_is_made(home):
    before = sorted(home.path.rglob("*"))
    for code, _, err in in_read_only(home, LOOKS):
        assert (code, err) == (0, "")
    assert sorted(home.path.rglob("*")) == before


def test_another_layout_that_cannot_be_brought_up_to_date_is_named(home):
    with Database(home).connect() as db, db.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0004'")
    [[code, _, err]] = in_read_only(home, [["pins", "ls"]])
    assert code == 1
    assert "has the layout 0004" in err
    assert "Make it writable, or copy the home" in err


def test_looking_makes_no_database_and_sees_the_one_that_is_made_later(home):
    assert Pins(home.database).ls("bot") == []
    assert not home.state_db.exists()
    assert not (home.path / "home.json").exists()
    kept(home, Database(home))
    assert len(Pins(home.database).ls("bot")) == 1
