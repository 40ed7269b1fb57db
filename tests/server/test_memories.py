"""Explicit memories over HTTP, on real stores."""

import json
import shutil

import pytest

from nightschool.memory.store import MemoryStore
from nightschool.store.api_keys import ApiKeys
from nightschool.store.audit import AuditLog
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from nightschool.store.registry import Registry
from tests.support.cli_home import add_version, make_run
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of

FACTS = "/api/memories/facts"


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path).ensure()


@pytest.fixture
def client(home):
    with client_of(FakeSlot(), registry=Registry(home)) as client:
        yield client


@pytest.fixture
def facts(client):
    assert client.post("/api/memories", json={"name": "facts"}).status_code == 201
    return client


def add(client, *texts, **more):
    answer = client.post(f"{FACTS}/entries", json={"entries": [{"text": text} | more for text in texts]})
    assert answer.status_code == 201, answer.text
    return answer.json()


def texts(client, **query):
    return [entry["text"] for entry in client.get(f"{FACTS}/entries", params=query).json()["entries"]]


def test_a_fact_is_added_edited_ended_and_its_history_stays(facts):
    added = add(facts, "Ada lives in Oslo.", source="chat_88")
    (entry,) = added["ids"]
    assert facts.get(f"{FACTS}/entries/{entry}").json()["source"] == "chat_88"
    edited = facts.patch(f"{FACTS}/entries/{entry}", json={"value": "Rome"}).json()
    assert edited["revision"] == added["revision"] + 1
    assert texts(facts) == ["Ada lives in Rome."]
    assert texts(facts, at=added["revision"]) == ["Ada lives in Oslo."]
    assert facts.delete(f"{FACTS}/entries/{entry}").json()["removed"] == 1
    assert texts(facts) == []
    assert facts.get(f"{FACTS}/entries/{entry}").status_code == 404
    assert facts.get(f"{FACTS}/entries/{entry}", params={"at": edited["revision"]}).status_code == 200
    versions = facts.get(f"{FACTS}/entries/{entry}/history").json()["versions"]
    assert [version["value"] for version in versions] == ["Oslo", "Rome"]
    operations = [write["operation"] for write in facts.get(f"{FACTS}/revisions").json()["revisions"]]
    assert operations == ["add", "edit", "remove"]


def test_triples_supersede_and_unclear_sentences_stay_beside_each_other(facts):
    triple = {"subject": "Ada", "relation": "lives in", "value": "Oslo"}
    assert facts.post(f"{FACTS}/entries", json={"entries": [triple]}).json()["added"] == 1
    again = facts.post(f"{FACTS}/entries", json={"entries": [triple | {"value": "Rome"}]}).json()
    assert (again["superseded"], len(texts(facts))) == (1, 1)
    add(facts, "It rained, as it often does.", "It rained, as it often did.")
    assert len(texts(facts)) == 3


def test_entries_are_read_page_by_page(facts):
    add(facts, *(f"Person {number} lives in Oslo." for number in range(5)))
    seen, after = [], 0
    while after is not None:
        page = facts.get(f"{FACTS}/entries", params={"after": after, "limit": 2}).json()
        seen += [entry["text"] for entry in page["entries"]]
        after = page["next"]
    assert seen == texts(facts)
    assert len(seen) == 5


def test_what_another_process_writes_is_read_at_once(facts, home):
    with MemoryStore.open(memory_path(home, "facts")) as other:
        assert facts.get(FACTS).json()["entries"] == 0
        other.add([_sentence("Ada lives in Oslo.")], author="cli")
    assert texts(facts) == ["Ada lives in Oslo."]


def _sentence(text):
    from nightschool.memory.entry import NewEntry

    return NewEntry(text)


def test_memories_are_listed_and_a_name_is_taken_once(facts):
    assert facts.get("/api/memories").json() == {
        "memories": [{"name": "facts", "revision": 0, "entries": 0, "shared": False}]
    }
    assert facts.post("/api/memories", json={"name": "facts"}).status_code == 409
    assert facts.post("/api/memories", json={"name": "../facts"}).status_code == 422
    assert facts.get("/api/memories/absent").status_code == 404
    assert facts.get("/api/memories/..%2f..%2fetc/entries").status_code in (400, 404)


@pytest.mark.parametrize(
    "fact",
    [
        {},
        {"text": " "},
        {"subject": "Ada", "relation": "lives in"},
        {"text": "a", "colour": "red"},
        {"text": "x" * 5000},
    ],
)
def test_what_is_no_fact_is_refused_and_nothing_is_stored(facts, fact):
    answer = facts.post(f"{FACTS}/entries", json={"entries": [{"text": "Ada lives in Oslo."}, fact]})
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert texts(facts) == []


@pytest.mark.parametrize("entry", ["m0", "m99", "x1", "m1'--", "%00", "m" + "9" * 60])
def test_an_entry_that_is_not_there_is_told_so(facts, entry):
    add(facts, "Ada lives in Oslo.")
    for method, more in (("GET", {}), ("PATCH", {"json": {"value": "Rome"}}), ("DELETE", {})):
        assert facts.request(method, f"{FACTS}/entries/{entry}", **more).status_code in (400, 404)
    assert texts(facts) == ["Ada lives in Oslo."]


def test_writes_are_undone_and_rolled_back_and_named_revisions_compared(facts):
    (entry,) = add(facts, "Ada lives in Oslo.")["ids"]
    named = facts.post(f"{FACTS}/versions", json={"name": "first"})
    assert (named.status_code, named.json()["revision"]) == (201, 1)
    assert facts.post(f"{FACTS}/versions", json={"name": "first"}).status_code == 409
    facts.patch(f"{FACTS}/entries/{entry}", json={"value": "Rome"})
    undone = facts.post(f"{FACTS}/undo").json()
    assert (undone["revision"], undone["undone"]) == (3, 2)
    assert texts(facts) == ["Ada lives in Oslo."]
    facts.delete(f"{FACTS}/entries/{entry}")
    changed = facts.get(f"{FACTS}/diff", params={"before": "first"}).json()
    assert (changed["total"], changed["entries"][0]["kind"], changed["entries"][0]["id"]) == (1, "removed", entry)
    assert facts.post(f"{FACTS}/rollback", json={"to": "first"}).status_code == 200
    assert texts(facts) == texts(facts, at="first") == texts(facts, at=1) == ["Ada lives in Oslo."]
    assert facts.post(f"{FACTS}/rollback", json={"to": "absent"}).status_code == 404
    assert facts.delete(f"{FACTS}/versions/first").status_code == 204
    assert facts.get(f"{FACTS}/versions").json() == {"versions": []}


def test_a_purged_entry_is_gone_for_good(facts, home):
    (entry,) = add(facts, "Ada lives in Oslo.")["ids"]
    facts.patch(f"{FACTS}/entries/{entry}", json={"value": "Rome"})
    facts.post(f"{FACTS}/versions", json={"name": "before"})
    purged = facts.delete(f"{FACTS}/entries/{entry}", params={"purge": True}).json()
    assert (purged["entries"], purged["rows"], purged["versions"]) == ([entry], 2, ["before"])
    assert (purged["learned"], purged["index_dropped"]) == ([], False)
    assert facts.get(f"{FACTS}/entries/{entry}/history").status_code == 404
    assert texts(facts, at="before") == []
    held = b"".join(path.read_bytes() for path in memory_path(home, "facts").rglob("*") if path.is_file())
    assert not any(word in held for word in (b"Oslo", b"Rome"))
    assert facts.post(f"{FACTS}/check").json()["ok"]


def test_conflicts_are_shown_and_settled(facts):
    facts.post(f"{FACTS}/relations", json={"relation": "lives in", "cardinality": "multi"})
    one, other = add(facts, "Ada lives in Oslo.", "Ada lives in Rome.")["ids"]
    assert facts.get(f"{FACTS}/conflicts").json()["total"] == 0
    facts.post(f"{FACTS}/relations", json={"relation": "lives in", "cardinality": "single"})
    (conflict,) = facts.get(f"{FACTS}/conflicts").json()["conflicts"]
    assert (conflict["kind"], conflict["a"]["id"], conflict["b"]["id"]) == ("values", one, other)
    settled = facts.post(f"{FACTS}/conflicts/resolve", json={"a": one, "b": other, "keep": "b"}).json()
    assert settled["removed"] == 1
    assert texts(facts) == ["Ada lives in Rome."]
    assert facts.get(f"{FACTS}/conflicts").json()["total"] == 0


def test_an_edit_says_one_thing(facts):
    (entry,) = add(facts, "Ada lives in Oslo.")["ids"]
    for body in ({}, {"text": "Ada lives in Rome.", "value": "Rome"}):
        assert facts.patch(f"{FACTS}/entries/{entry}", json=body).status_code == 400


def test_a_key_reads_and_writes_only_with_the_scope_and_in_its_own_tenant(home):
    keys = ApiKeys(home.database)
    acme = {"x-api-key": keys.create("acme", by="test")[1]}
    other = {"x-api-key": keys.create("other", by="test")[1]}
    weak = {"x-api-key": keys.create("acme", scopes=frozenset({"infer", "train"}), by="test")[1]}
    with client_of(FakeSlot(), registry=Registry(home), host="0.0.0.0") as client:
        client.headers["host"] = "127.0.0.1"
        assert client.post("/api/memories", json={"name": "facts"}, headers=acme).status_code == 201
        body = {"entries": [{"text": "Ada lives in Oslo."}]}
        assert client.post(f"{FACTS}/entries", json=body, headers=acme).status_code == 201
        for method, path in (("GET", f"{FACTS}/entries"), ("POST", f"{FACTS}/entries")):
            refused = client.request(method, path, json=body, headers=weak)
            assert (refused.status_code, "memory" in refused.json()["detail"]) == (403, True)
        assert client.get(f"{FACTS}/entries", headers=other).status_code == 404
        assert client.get("/api/memories", headers=other).json() == {"memories": []}
    entry = MemoryStore.open(memory_path(home, "acme/facts")).get("m1")
    assert entry.author.startswith("key:")
    assert "memory.add" in [row.action for row in AuditLog(home.database).ls()]


def test_a_server_without_a_home_says_so():
    with client_of(FakeSlot()) as client:
        assert client.get("/api/memories").status_code == 409


def test_a_memory_that_was_deleted_is_gone_and_one_of_the_same_name_is_another(facts, home):
    add(facts, "Ada lives in Oslo.")
    folder = memory_path(home, "facts")
    shutil.rmtree(folder)
    assert facts.get(FACTS).status_code == 404
    assert facts.get(f"{FACTS}/entries").status_code == 404
    assert facts.post("/api/memories", json={"name": "facts"}).status_code == 201
    assert texts(facts) == []
    shutil.rmtree(folder)
    with MemoryStore.create(folder) as other:
        other.add([_sentence("Bob likes tea.")], author="cli")
    assert texts(facts) == ["Bob likes tea."]


def test_a_write_and_the_list_of_versions_say_what_versions_learned_and_holds_no_longer(facts, home):
    run = make_run(home, name="bot")
    said = [{"role": "user", "content": "Where is Ada?"}, {"role": "assistant", "content": "In Oslo.", "weight": 1}]
    (run.path / "new_examples.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    learned = add_version(home, name="bot", run_id=run.id)
    assert add(facts, "Ada lives in Oslo.", "Bob lives in Oslo.")["stale"] == []
    edited = facts.patch(f"{FACTS}/entries/m1", json={"value": "Rome"}).json()
    assert edited["stale"] == [{"id": "m1", "text": "Ada lives in Oslo.", "ended": 2, "versions": [learned.ref]}]
    assert facts.delete(f"{FACTS}/entries/m2").json()["stale"] == []
    for answer in (facts.get("/api/models/bot").json(), facts.get("/api/models").json()["models"][0]):
        assert [version["stale"] for version in answer["versions"]] == [[{"memory": "facts", "id": "m1"}]]
    assert facts.post(f"{FACTS}/rollback", json={"to": "1"}).json()["stale"] == []
    assert facts.get("/api/models/bot").json()["versions"][0]["stale"] == []
    purged = facts.delete(f"{FACTS}/entries/m1", params={"purge": True}).json()
    assert purged["learned"] == [{"id": "m1", "versions": [learned.ref]}]
