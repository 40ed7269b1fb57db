"""A memory as mem0's own client uses it, unmodified, against a real server; and what it is told over plain HTTP."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from nightschool.memory.entity_ids import EntityIds
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.store.api_keys import ApiKeys
from nightschool.store.audit import AuditLog
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from nightschool.store.registry import Registry
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of, live

ALEX = {"user_id": "alex"}
OSLO, ROME, TEA = "Ada lives in Oslo.", "Ada lives in Rome.", "Bob likes tea."


@pytest.fixture(scope="module")
def mem0(tmp_path_factory):
    """The package. It writes its settings where it is told to when it is imported, and reports on its use unless it is told not to."""
    told = {"MEM0_DIR": str(tmp_path_factory.mktemp("mem0")), "MEM0_TELEMETRY": "False"}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield pytest.importorskip("mem0", reason="mem0ai is not installed: make install-ci")
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home")).ensure()


@pytest.fixture(scope="module")
def url(home):
    with live(FakeSlot(), registry=Registry(home)) as server:
        yield server.url


@contextmanager
def client_at(mem0, url, name):
    http = httpx.Client()
    try:
        yield mem0.MemoryClient(api_key="none", host=f"{url}/mem0/{name}", client=http)
    finally:
        http.close()


@pytest.fixture
def memory(mem0, home, url, request):
    """A client of a memory of the test's own."""
    name = f"m{abs(hash(request.node.name))}"
    MemoryStore.create(memory_path(home, name)).close()
    with client_at(mem0, url, name) as client:
        yield client


def events(answer):
    return [(one["event"], one["memory"], one["previous_memory"]) for one in answer["results"]]


def texts(answer):
    return [one["memory"] for one in answer["results"]]


def test_the_life_of_a_memory(memory):
    (added,) = memory.add(OSLO, user_id="alex")["results"]
    assert (added["event"], added["memory"]) == ("ADD", OSLO)
    assert events(memory.add(ROME, user_id="alex")) == [("UPDATE", ROME, OSLO)]
    (found,) = memory.search("Where does Ada live?", filters=ALEX)["results"]
    assert (found["id"], found["memory"], found["user_id"]) == (added["id"], ROME, "alex")
    assert found["metadata"] == {"subject": "Ada", "relation": "lives in", "value": "Rome"}
    assert 0 < found["score"] <= 1
    one = memory.get(added["id"])
    assert one == {name: value for name, value in found.items() if name != "score"}
    assert one["created_at"] < one["updated_at"]
    assert memory.update(added["id"], text="Ada lives in Bergen.")["memory"] == "Ada lives in Bergen."
    assert memory.delete(added["id"], delete_linked=True)["message"]
    assert memory.get_all(filters=ALEX)["results"] == []
    past = memory.history(added["id"])
    assert [(one["event"], one["old_memory"], one["new_memory"]) for one in past] == [
        ("ADD", None, OSLO),
        ("UPDATE", OSLO, ROME),
        ("UPDATE", ROME, "Ada lives in Bergen."),
        ("DELETE", "Ada lives in Bergen.", None),
    ]
    assert {(one["memory_id"], one["user_id"]) for one in past} == {(added["id"], "alex")}
    assert [one["updated_at"] for one in past] == sorted({one["updated_at"] for one in past})


def test_each_sentence_of_a_user_is_a_memory_and_no_question_is(memory):
    said = [
        {"role": "system", "content": "You know everything."},
        {"role": "user", "content": f"Hi, I'm Alex. {OSLO} {TEA}\nWhere does Eve live?"},
        {"role": "assistant", "content": "Eve lives in Rome."},
    ]
    assert texts(memory.add(said, user_id="alex")) == ["Hi, I'm Alex.", OSLO, TEA]
    assert events(memory.add(f"{TEA} {ROME}", user_id="alex")) == [("NONE", TEA, None), ("UPDATE", ROME, OSLO)]
    gone = "Bob no longer likes tea."
    assert events(memory.add(gone, user_id="alex")) == [("ADD", gone, None), ("DELETE", TEA, None)]
    assert memory.add("Who are you?", user_id="nobody") == {"results": []}


def test_without_infer_messages_are_kept_whole(memory):
    said = [
        {"role": "user", "content": "Who is it? Eve."},
        {"role": "assistant", "content": f"{OSLO} {TEA}"},
        {"role": "tool", "content": "12"},
    ]
    kept = ["Who is it? Eve.", f"{OSLO} {TEA}"]
    assert texts(memory.add(said, user_id="alex", infer=False)) == kept
    assert texts(memory.get_all(filters=ALEX)) == kept


def test_each_set_of_ids_has_a_memory_of_its_own_that_models_read_as_an_overlay(memory, home):
    name = memory.project_id
    of_alex = memory.add(OSLO, user_id="alex")["results"][0]["id"].rpartition("-")[0]
    memory.add(ROME, user_id="alex", run_id="7")
    memory.add("Ada lives in Bergen.", agent_id="alex")
    memory.add(TEA)
    assert texts(memory.get_all(filters=ALEX)) == [OSLO]
    both = {"AND": [{"run_id": "7"}, ALEX]}
    assert texts(memory.get_all(filters=both)) == texts(memory.search("Ada", filters=both)) == [ROME]
    assert texts(memory.get_all(filters={"agent_id": "alex", "user_id": None} | {"user_id": "alex"})) == []
    assert texts(memory.get_all()) == [TEA]
    with MemoryStore.open(memory_path(home, of_alex)) as store:
        (entry,) = store.entries()
    assert (of_alex, entry.text, entry.source) == (EntityIds("alex").memory(name), OSLO, "mem0?user_id=alex")


def test_all_is_listed_page_by_page(memory):
    memory.add("\n".join(f"Ada{number} lives in Oslo." for number in range(5)), user_id="alex")
    first, last = (memory.get_all(filters=ALEX, page=page, page_size=3) for page in (1, 2))
    assert texts(first) + texts(last) == [f"Ada{number} lives in Oslo." for number in range(5)]
    assert (first["count"], first["previous"], last["next"]) == (5, None, None)
    assert "page=2" in first["next"]
    assert "page=1" in last["previous"]
    assert memory.get_all(filters=ALEX, page=9)["results"] == []
    assert len(memory.search("ada", filters=ALEX, top_k=2)["results"]) == 2
    assert memory.search("Ada1 sings", filters=ALEX, threshold=0.6)["results"] == []


def test_deleting_all_of_somebody_leaves_the_others(memory):
    memory.add(f"{OSLO} {TEA}", user_id="alex")
    memory.add(OSLO, user_id="bo")
    assert memory.delete_all(user_id="alex")["message"]
    assert memory.delete_all(user_id="nobody")["message"]
    assert texts(memory.get_all(filters=ALEX)) == []
    assert texts(memory.get_all(filters={"user_id": "bo"})) == [OSLO]


def test_the_asynchronous_client_has_the_same(mem0, memory):
    async def used():
        async with mem0.AsyncMemoryClient(api_key="none", host=memory.host) as client:
            await client.add(OSLO, user_id="alex")
            return await client.get_all(filters=ALEX)

    assert texts(asyncio.run(used())) == texts(memory.get_all(filters=ALEX)) == [OSLO]


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("add", {"messages": OSLO, "user_id": "alex", "metadata": {"a": 1}}, "metadata"),
        ("add", {"messages": OSLO, "user_id": "alex", "colour": "red"}, "colour"),
        ("add", {"messages": OSLO, "user_id": "alex", "filters": {"user_id": "bo"}}, "Two different values of user_id"),
        ("add", {"messages": OSLO, "user_id": "*"}, "user_id"),
        ("add", {"messages": OSLO, "user_id": "ü" * 400}, "shorter ids"),
        ("add", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ("add", {"messages": "Ada.\n" * 1001, "user_id": "alex"}, "1001 sentences"),
        ("add", {"messages": "x" * 5000, "user_id": "alex"}, "Nothing was stored"),
        ("get_all", {"filters": {"OR": [ALEX]}}, "'OR'"),
        ("get_all", {"filters": {"AND": [ALEX, {"NOT": [ALEX]}]}}, "'NOT'"),
        ("get_all", {"filters": {"AND": ALEX}}, "AND takes a list"),
        ("get_all", {"filters": {"AND": [1]}}, "AND takes a list"),
        ("get_all", {"filters": {"user_id": "*"}}, "user_id takes one id"),
        ("get_all", {"filters": {"user_id": {"in": ["alex"]}}}, "user_id takes one id"),
        ("get_all", {"filters": ALEX, "page": 0}, "page"),
        ("search", {"query": "Ada", "filters": {"created_at": {"gte": "2026-01-01"}}}, "'created_at'"),
        ("search", {"query": "Ada", "filters": ALEX, "rerank": True}, "rerank"),
        ("delete_all", {}, "Whose memories are meant"),
        ("delete_all", {"user_id": "alex", "colour": "red"}, "colour"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_and_changes_nothing(mem0, memory, method, arguments, words):
    memory.add(TEA, user_id="alex")
    with pytest.raises(mem0.exceptions.ValidationError, match=words):
        getattr(memory, method)(**arguments)
    assert texts(memory.get_all(filters=ALEX)) == [TEA]
    assert texts(memory.get_all()) == []


def test_an_id_of_another_memory_is_not_there(mem0, memory, home, url):
    own = memory.add(OSLO, user_id="alex")["results"][0]["id"]
    MemoryStore.create(memory_path(home, "elsewhere")).close()
    with client_at(mem0, url, "elsewhere") as other:
        theirs = other.add(ROME, user_id="alex")["results"][0]["id"]
    for wrong in (theirs, own.replace("-m1", "-m2"), "m1", "x", f"{memory.project_id}-m1", f"../{own}"):
        for call in (memory.get, memory.history, memory.delete, lambda one: memory.update(one, text=TEA)):
            with pytest.raises(mem0.exceptions.MemoryNotFoundError):
                call(wrong)
    with pytest.raises(mem0.exceptions.ValidationError, match="metadata"):
        memory.update(own, text=TEA, metadata={"a": 1})
    assert memory.get(own)["memory"] == OSLO


def test_a_memory_that_is_not_there_is_told_when_a_client_is_made(mem0, url):
    with pytest.raises(ValueError, match="There is no memory 'absent'"), client_at(mem0, url, "absent"):
        pass


# Over plain HTTP: what needs keys and tenants.


@pytest.fixture
def tenants(tmp_path):
    """A home where acme has a memory, and everybody shares one; and a client of its server."""
    home = Home(tmp_path / "home").ensure()
    with MemoryStore.create(memory_path(home, "common")) as store:
        store.add([NewEntry(TEA)], author="test")
    MemoryStore.create(memory_path(home, "acme/friends")).close()
    with client_of(FakeSlot(), registry=Registry(home), shared_memories=("common",)) as client:
        yield client, home


def key_of(home, tenant, **more):
    return {"authorization": f"Token {ApiKeys(home.database).create(tenant, by='test', **more)[1]}"}


def add(client, memory, key, text, **more):
    message = [{"role": "user", "content": text}]
    return client.post(f"/mem0/{memory}/v3/memories/add/", json={"messages": message} | more, headers=key)


def test_a_key_opens_the_memories_of_its_tenant_if_it_may(tenants):
    client, home = tenants
    acme, other, weak = key_of(home, "acme"), key_of(home, "other"), key_of(home, "acme", scopes={"infer"})
    ping = client.get("/mem0/friends/v1/ping/", headers=acme)
    assert ping.json() == {"status": "ok", "org_id": "acme", "project_id": "friends"}
    assert client.get("/mem0/friends/v1/ping/", headers=other).status_code == 404
    refused = client.get("/mem0/friends/v1/ping/", headers=weak)
    assert (refused.status_code, "scope 'memory'" in refused.json()["detail"]) == (403, True)
    assert client.get("/mem0/friends/v1/ping/", headers={"authorization": "Token wrong"}).status_code == 401
    memory_id = add(client, "friends", acme, OSLO, **ALEX).json()["results"][0]["id"]
    path = f"/mem0/friends/v1/memories/{memory_id}/"
    assert client.get(path, headers=acme).json()["memory"] == OSLO
    assert client.get(path, headers=other).status_code == client.delete(path, headers=other).status_code == 404


def test_only_what_changed_is_noted_with_the_memory_that_it_changed(tenants):
    client, home = tenants
    acme = key_of(home, "acme")
    for _ in range(2):
        add(client, "friends", acme, OSLO, **ALEX)
    client.delete("/mem0/friends/v1/memories/?user_id=nobody", headers=acme)
    (noted,) = [row for row in AuditLog(home.database).ls() if row.action.startswith("memory")]
    assert (noted.action, noted.target, noted.tenant) == ("memory.add", EntityIds("alex").memory("friends"), "acme")


def test_ids_of_a_tenant_may_lie_over_a_memory_that_is_shared_with_it(tenants):
    client, home = tenants
    acme = key_of(home, "acme")
    assert add(client, "common", acme, OSLO, **ALEX).status_code == 200
    assert add(client, "common", acme, OSLO).status_code == 404, "nobody writes what is shared"
    overlay = EntityIds("alex").memory("common")
    read = client.get("/api/memories/common/search", params={"q": "likes lives", "overlay": overlay}, headers=acme)
    assert [one["text"] for one in read.json()["entries"]] == [OSLO, TEA]


def test_whoever_comes_first_makes_the_memory_of_new_ids_and_nobody_is_lost(tenants):
    client, home = tenants
    acme = key_of(home, "acme")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: add(client, "friends", acme, f"Ada{number} sings.", **ALEX), range(8)))
    assert [one.status_code for one in answers] == [200] * 8
    with MemoryStore.open(memory_path(home, f"acme/{EntityIds('alex').memory('friends')}")) as store:
        assert sorted(one.text for one in store.entries()) == [f"Ada{number} sings." for number in range(8)]


def test_what_was_edited_elsewhere_is_still_somebodys(tenants):
    client, home = tenants
    acme = key_of(home, "acme")
    memory_id = add(client, "friends", acme, OSLO, **ALEX).json()["results"][0]["id"]
    memory, _, entry = memory_id.rpartition("-")
    client.patch(f"/api/memories/{memory}/entries/{entry}", json={"value": "Rome"}, headers=acme)
    one = client.get(f"/mem0/friends/v1/memories/{memory_id}/", headers=acme).json()
    assert (one["memory"], one["user_id"]) == (ROME, "alex")
