"""Deleting a conversation: its copies go, and what may know it is marked."""

import json
import os

import pytest

from nightschool.errors import Conflict, NotFound
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.erasure import erase, taints_of, traces_of
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.teachers_words import FILE, cache_of
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.views.versions import version_story, version_summary
from tests.support.cli_home import add_version, make_run

ASKED = [{"role": "user", "content": "My secret is 4711."}]


def example(request_id, text="My secret is 4711."):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "ok", "weight": 1}]
    return {"id": request_id, "source": "conversations", "messages": messages}


def write(run, file, *rows):
    (run.path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def story(home):
    """A conversation that one run learned, another replayed, a third held out, and that a fourth never saw."""
    store = ConversationStore(home.database)
    for request_id in ("req-1", "req-2"):
        store.record(request_id, "acme/bot", "v", ASKED, "ok", "key-1")
    other = example("req-2", "Another.")
    runs = {}
    for minutes, (file, name) in enumerate(
        [("new_examples.jsonl", "learned"), ("replayed.jsonl", "replayed"), ("heldout.jsonl", "held"), (None, "clean")]
    ):
        runs[name] = run = make_run(home, name="acme/bot", minutes=minutes)
        write(run, "new_examples.jsonl", other)
        if file:
            write(run, file, example("req-1"), other)
    versions = {
        "before": add_version(home, name="acme/bot"),
        "learned": add_version(home, name="acme/bot", run_id=runs["learned"].id),
    }
    parent = versions["learned"].ref
    versions["child"] = add_version(home, name="acme/bot", run_id=runs["clean"].id, parent=parent)
    versions["grandchild"] = add_version(home, name="acme/bot", parent=versions["child"].ref)
    versions["stands"] = add_version(home, name="acme/other", kind="adapter", base=versions["child"].ref)
    versions["replayed"] = add_version(home, name="acme/bot", run_id=runs["replayed"].id)
    versions["held"] = add_version(home, name="acme/bot", run_id=runs["held"].id)
    return store, runs, versions


def test_the_traces_of_a_conversation_lead_to_all_that_may_know_it(home, story):
    store, runs, versions = story
    found = traces_of(home, store.get("req-1"))
    assert set(found.runs) == {runs[name].id for name in ("learned", "replayed", "held")}
    knows = ("learned", "child", "grandchild", "stands", "replayed")
    assert set(found.versions) == {versions[name].ref for name in knows}


def test_what_a_version_learned_is_known_though_its_run_is_gone(home):
    ConversationStore(home.database).record("req-1", "bot", "v", ASKED, "ok")
    version = add_version(home)
    AcceptedExamples(home.database).add("bot", version.id, [example("req-1")])
    assert traces_of(home, ConversationStore(home.database).get("req-1")).versions == (version.ref,)


def test_deleting_cuts_the_copies_and_marks_the_versions(home, story):
    store, runs, versions = story
    before = (runs["clean"].path / "new_examples.jsonl").read_text()
    said = [runs["learned"].path / FILE, cache_of(home) / "0.safetensors"]
    for file in [*said, runs["clean"].path / FILE]:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"what a teacher said")
    found, _ = erase(home, "req-1")
    assert not any(file.exists() for file in said)
    assert (runs["clean"].path / FILE).exists()
    assert set(found.versions) <= {version.ref for version in versions.values()}
    left = b"".join(path.read_bytes() for path in home.path.rglob("*.jsonl"))
    assert b"4711" not in left
    assert left.count(b"req-2") >= 4, "what others said stays"
    assert (runs["clean"].path / "new_examples.jsonl").read_text() == before
    with pytest.raises(NotFound):
        store.get("req-1")
    assert store.get("req-2").messages == ASKED
    registry = Registry(home)
    for name, version in versions.items():
        tainted = ["req-1"] if version.ref in found.versions else []
        assert version_summary(registry, version, {})["tainted"] == tainted, name
        assert version_story(registry, version, {})["tainted"] == tainted
    assert versions["before"].id not in taints_of(home.database, "acme/bot")


def test_what_says_the_same_is_a_copy_in_the_data_of_runs_and_in_what_is_replayed(home, story):
    _, runs, versions = story
    plain = example("", "My secret is 4711.") | {"source": "train.jsonl"}
    write(runs["clean"], "new_examples.jsonl", plain, example("req-2"))
    (runs["clean"].path / "plan.json").write_text(json.dumps({"steps": 3, "loss_masks": [[{"text": "4711"}]]}))
    AcceptedExamples(home.database).add("acme/bot", versions["before"].id, [plain])
    by_id = traces_of(home, ConversationStore(home.database).get("req-1"), by_content=False)
    assert runs["clean"].id not in by_id.runs
    found, replayed = erase(home, "req-1")
    assert runs["clean"].id in found.runs
    assert versions["before"].ref in found.versions
    assert replayed == 1
    assert json.loads((runs["clean"].path / "new_examples.jsonl").read_text())["id"] == "req-2"
    assert json.loads((runs["clean"].path / "plan.json").read_text()) == {"steps": 3, "loss_masks": []}


def test_a_run_that_learns_it_now_comes_first(home, story):
    _, runs, _ = story
    runs["held"].update_status(state="running", pid=os.getpid())
    with pytest.raises(Conflict, match="is learning req-1 now"):
        erase(home, "req-1")
    assert ConversationStore(home.database).get("req-1")
    assert taints_of(home.database, "acme/bot") == {}


def test_only_whoever_it_is_of_may_delete_it(home, story):
    for who in ({"owner": "key-2"}, {"tenant": "other"}, {"tenant": "default"}):
        with pytest.raises(NotFound):
            erase(home, "req-1", **who)
    erase(home, "req-1", owner="key-1", tenant="acme")


def test_a_deletion_that_was_cut_off_is_done_again(home, story, monkeypatch):
    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(ConversationStore, "forget", cut)
        with pytest.raises(KeyboardInterrupt):
            erase(home, "req-1")
    erase(home, "req-1")
    assert taints_of(home.database, "acme/bot")
