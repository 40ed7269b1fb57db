"""A verb connects to one database once, and leaves no connection behind."""

import gc

import pytest
import sqlalchemy as sa

from nightschool.cli.main import AUDITED, main
from nightschool.feedback.conversations import ConversationStore
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
def test_a_verb_connects_once_and_closes_what_it_opened(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NIGHTSCHOOL_HOME", raising=False)
    (tmp_path / "bot.yaml").write_text("name: bot\nbase: new:tiny\ndata: [{path: a.json}]\n")
    home = Home.find()
    ConversationStore(home.database).record("r1", "bot", "20261126_120000", [{"role": "user", "content": "?"}], "!")
    home.database.close()
    if verb[:2] == ["pins", "rm"]:
        assert main(["pins", "add", "Who?", "Zoe."]) == 0
        gc.collect()
    engines, opened, closed = set(), [], []
    hooks = [
        (sa.Engine, "engine_connect", lambda connection: engines.add(id(connection.engine))),
        (sa.Pool, "connect", lambda connection, _: opened.append(connection)),
        (sa.Pool, "close", lambda connection, _: closed.append(connection)),
    ]
    for hook in hooks:
        sa.event.listen(*hook)
    try:
        assert main(verb) == 0
        gc.collect()
    finally:
        for hook in hooks:
            sa.event.remove(*hook)
    # What a verb has done is noted in the audit log after it has closed what it opened.
    assert len(engines) == 1 + (tuple(verb[:2]) in AUDITED)
    assert opened
    assert {id(one) for one in opened} <= {id(one) for one in closed}
