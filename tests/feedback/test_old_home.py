"""A home as the release before tenants left it: opened, migrated, read, gone on with, rolled back; nothing moves."""

import json

import pytest

from nightschool.config.recipe import DataSource
from nightschool.data.example import Example
from nightschool.errors import NotFound
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.pins import Pins
from nightschool.feedback.promotion import promote, roll_back
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.training_data import load_sources
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.ledger import Ledger
from nightschool.store.manifest import write_manifest
from nightschool.store.registry import Registry, VersionMetadata
from nightschool.store.runs import RunStore
from nightschool.uploads.journal import Journal
from tests.support.store_databases import environment, old_database, postgres, postgres_url  # noqa: F401

FIRST, SECOND = "20261126_161655", "20261126_161756"
RUNS = {FIRST: "bot-20261126_161625", SECOND: "bot-20261126_161729"}
ALIASES = {
    "format": 1,
    "aliases": {"champion": SECOND},
    "pinned": False,
    "history": [
        {"at": "2026-11-26T16:17:25+00:00", "by": "cycle", "alias": "champion", "action": "promote", "before": before, "after": after}
        for before, after in ((None, FIRST), (FIRST, SECOND))
    ],
    "issued": [FIRST, SECOND],
    "removed": [],
}  # fmt: skip


def example(number):
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]}


def rows(home):
    moment = "'2026-11-26 16:30:00'"
    yield from (
        f"INSERT INTO accepted_versions (name, version, active) VALUES ('bot', '{version}', true)" for version in RUNS
    )
    for number, version in enumerate(RUNS):
        yield (
            "INSERT INTO accepted_examples (name, version, digest, example) VALUES "
            f"('bot', '{version}', '{Example.from_json(example(number)).digest}', '{json.dumps(example(number))}')"
        )
    yield (
        "INSERT INTO conversations (request_id, recorded_at, model, version, tenant, messages, answer) VALUES "
        f"""('r1', {moment}, 'bot', '{SECOND}', 'digest', '[{{"role": "user", "content": "Who?"}}]', '"Me."')"""
    )
    yield (
        "INSERT INTO feedback (request_id, recorded_at, rating, correction) VALUES "
        f"""('r1', {moment}, 'bad', '"Zoe Quinn."')"""
    )
    yield f"""INSERT INTO pins (name, question, answer, created_at) VALUES ('bot', '"q0"', '"a0"', {moment})"""
    yield (
        "INSERT INTO cycles (name, due_at, trigger, pid, started_at, outcome, run_id, candidate) VALUES "
        f"('bot', {moment}, 'due', 11911, {moment}, 'promoted', '{RUNS[SECOND]}', 'bot@{SECOND}')"
    )
    yield f"INSERT INTO schedules (name, paused_at) VALUES ('bot', {moment})"
    yield (
        "INSERT INTO uploads (home, path, url, run_id, name, step, digest, archive, size_bytes, state, attempts, "
        f"next_try_at, queued_at) VALUES ('{home.path}', '{home.runs}/{RUNS[SECOND]}/checkpoints/c', 'file:///b', "
        f"'{RUNS[SECOND]}', 'c', 6, 'd', false, 1, 'done', 1, {moment}, {moment})"
    )


@pytest.fixture
def home(tmp_path, environment, monkeypatch):  # noqa: F811
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    home = Home(tmp_path / "home").ensure()
    old_database(home, environment, "0004", *rows(home))
    parent = None
    for version, run_id in RUNS.items():
        run = home.runs / run_id
        (run / "checkpoints").mkdir(parents=True)
        (run / "recipe.yaml").write_text("name: bot\nbase: new:tiny\n")
        status = {"run_id": run_id, "name": "bot", "state": "completed", "step": 6, "pid": 11911, "exit_code": 0}
        (run / "status.json").write_text(json.dumps(status | {"pid_created_at": 1.0, "candidate": f"bot@{version}"}))
        folder = home.models / "bot" / version
        folder.mkdir(parents=True)
        facts = {"name": "bot", "version": version, "method": "full", "parent": parent, "run_id": run_id}
        (folder / "nightschool.json").write_text(json.dumps(facts))
        (folder / "model.safetensors").write_bytes(version.encode())
        write_manifest(folder, ref=f"bot@{version}", parent=parent)
        parent = f"bot@{version}"
    (home.models / "bot" / "aliases.json").write_text(json.dumps(ALIASES))
    return home


def test_everything_is_there_and_is_the_default_tenants(home):
    files = {path for path in home.path.rglob("*") if path.parent != home.path}
    with Database(home).connect() as database:
        registry, store = Registry(home), RunStore(home)
        assert registry.names() == registry.names("default") == ["bot"]
        assert registry.resolve("default/bot").ref == registry.resolve("bot").ref == f"bot@{SECOND}"
        registry.resolve("bot").verify()
        assert [run.id for run in store.ls()] == [RUNS[SECOND], RUNS[FIRST]]
        assert not store.get(RUNS[SECOND]).status.process_lives
        assert len(AcceptedExamples(database).digests("bot")) == 2
        assert [pin.answer for pin in Pins(database).ls("bot")] == ["a0"]
        assert [cycle.candidate for cycle in Ledger(database).ls("bot")] == [f"bot@{SECOND}"]
        assert Ledger(database).paused("bot")
    assert [(row.run_id, row.state) for row in Journal(home).ls()] == [(RUNS[SECOND], "done")]
    (home.path / "locks").mkdir(exist_ok=True)
    moved = {path for path in files if not path.exists() and path.suffix != ".lock"}
    assert not moved


def test_only_the_key_that_asked_before_may_rate_the_answer_now(home):
    with Database(home).connect() as database:
        conversations = ConversationStore(database)
        with pytest.raises(NotFound):
            conversations.feedback("r1", "good", owner="another digest")
        conversations.feedback("r1", "good", owner="digest")
        assert conversations.get("r1").rating == "good"


def test_the_next_night_studies_what_was_said_before(home):
    source = DataSource.model_validate({"from": "conversations", "where": {"corrected": True}})
    for name, answers in (("bot", ["Zoe Quinn."]), ("acme/bot", [])):
        loaded = load_sources([source], root=home.path, home=home, name=name)
        assert [one.messages[-1].content for one in loaded.examples] == answers


def test_it_goes_on_and_rolls_back(home):
    registry = Registry(home)
    run = RunStore(home).create({"name": "bot", "base": f"bot@{SECOND}"}, name="bot")
    (run.path / "new_examples.jsonl").write_text(json.dumps(example(2)) + "\n")
    third = registry.publish(
        "bot",
        lambda folder: (folder / "model.safetensors").write_bytes(b"3") and None,
        VersionMetadata(run_id=run.id, parent=f"bot@{SECOND}"),
    )
    assert third.path.parent == home.models / "bot"
    promote(home, "bot", third.id, by="test")
    for champion, count in ((third.id, 3), (SECOND, 2), (FIRST, 1)):
        assert registry.resolve("bot").id == champion
        with Database(home).connect() as database:
            assert len(AcceptedExamples(database).digests("bot")) == count
        if champion != FIRST:
            roll_back(home, "bot", by="test")
