"""`nightschool keys` and `nightschool audit` on the command line."""

import json

import pytest

from nightschool.cli.main import main
from nightschool.store.api_keys import ApiKeys, digest_of
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from tests.support.cli_home import add_version


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USER", "ada")
    monkeypatch.delenv("NIGHTSCHOOL_HOME", raising=False)
    return Home.find()


def told(capsys, *words):
    code = main([*words, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert code == 0, shown
    return shown


def test_a_key_is_made_listed_and_revoked(home, capsys):
    made = told(
        capsys, "keys", "create", "--tenant", "acme", "--scopes", "infer,train", "--expires", "90d", "--label", "CI"
    )
    assert made["key"].startswith("ns-")
    assert ApiKeys(home.database).find(digest_of(made["key"])).id == made["id"]
    [row] = told(capsys, "keys", "ls")
    assert row == {name: value for name, value in made.items() if name != "key"}
    assert (row["tenant"], row["state"], row["scopes"], row["label"]) == ("acme", "active", ["infer", "train"], "CI")
    assert told(capsys, "keys", "ls", "--tenant", "other") == []
    assert main(["keys", "ls"]) == 0
    assert made["key"] not in capsys.readouterr().out
    assert main(["keys", "revoke", made["id"]]) == 2
    assert "Add --yes" in capsys.readouterr().err
    assert told(capsys, "keys", "revoke", made["id"], "--yes") == {"revoked": [made["id"]]}
    assert told(capsys, "keys", "ls")[0]["state"] == "revoked"
    assert main(["keys", "revoke", "key_0", "--yes"]) == 4


def test_quiet_prints_the_key_alone(home, capsys):
    assert main(["keys", "create", "-q"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert ApiKeys(home.database).find(digest_of(line)).tenant == "default"


@pytest.mark.parametrize(
    "words", [("--scopes", "fly"), ("--scopes", ""), ("--expires", "soon"), ("--expires", "0s"), ("--tenant", "../x")]
)
def test_a_key_that_makes_no_sense_is_not_made(home, capsys, words):
    assert main(["keys", "create", *words]) == 2
    assert "error: " in capsys.readouterr().err
    assert not ApiKeys(home.database).any()


def test_the_command_line_is_in_the_audit_log_too(home, capsys):
    first, second = add_version(home, name="acme/bot"), add_version(home, name="acme/bot")
    for version in (first, second):
        assert main(["models", "promote", version.ref]) == 0
    assert main(["models", "rollback", "acme/bot"]) == 0
    assert main(["models", "promote", "acme/bot@20200101_000000"]) == 4
    assert main(["models", "promote", "--help"]) == 0
    made, _ = ApiKeys(home.database).create("default", by="cli:ben")
    capsys.readouterr()
    rows = told(capsys, "audit", "ls")
    assert [(row["tenant"], row["by"], row["action"], row["target"]) for row in rows] == [
        ("default", "cli:ben", "key.create", made.id),
        ("acme", "cli:ada", "model.rollback", "acme/bot"),
        ("acme", "cli:ada", "model.promote", second.ref),
        ("acme", "cli:ada", "model.promote", first.ref),
    ]
    assert Registry(home).champion("acme/bot") == first
    assert [row["action"] for row in told(capsys, "audit", "ls", "--action", "key", "--since", "1h")] == ["key.create"]
    assert len(told(capsys, "audit", "ls", "--tenant", "acme", "--limit", "2")) == 2
    assert main(["audit", "ls", "--since", "soon"]) == 2
    assert main(["audit", "ls", "-q"]) == 0
