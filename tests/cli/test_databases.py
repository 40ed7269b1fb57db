"""Whoever opens a database closes it: nothing that a verb opened is left behind."""

import pytest

from nightschool.cli.main import main
from nightschool.feedback.conversations import ConversationStore
from nightschool.store import database as module
from nightschool.store.database import open_database
from nightschool.store.home import Home

VERBS = [
    ["pins", "add", "Who?", "Zoe."],
    ["pins", "ls"],
    ["pins", "rm", "1", "--yes"],
    ["schedule", "ls"],
    ["schedule", "next", "bot.yaml"],
    ["schedule", "pause", "bot"],
    ["schedule", "resume", "bot"],
    ["uploads", "ls"],
    ["uploads", "status"],
    ["data", "forget", "r1", "--yes"],
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_verb_closes_what_it_opens(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NIGHTSCHOOL_HOME", raising=False)
    (tmp_path / "bot.yaml").write_text("name: bot\nbase: new:tiny\ndata: [{path: a.json}]\n")
    with open_database(Home.find()) as db:
        ConversationStore(db).record("r1", "bot", "20261126_120000", [{"role": "user", "content": "?"}], "!")
    if verb[:2] == ["pins", "rm"]:
        assert main(["pins", "add", "Who?", "Zoe."]) == 0
    opened, closed = [], []

    class Counted(module.Database):
        def __init__(self, engine, **settings):
            super().__init__(engine, **settings)
            opened.append(self)

        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr(module, "Database", Counted)
    assert main(verb) == 0
    assert opened
    assert {id(one) for one in opened} == {id(one) for one in closed}
