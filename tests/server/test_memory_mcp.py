"""A memory as clients of the Model Context Protocol use it over HTTP: the SDK's own client, and plain requests."""

import ast
import asyncio
import json
import logging
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from nightschool.memory import mcp as memory_mcp
from nightschool.memory.entry import NewEntry
from nightschool.memory.graph import KnowledgeGraph
from nightschool.memory.store import MemoryStore
from nightschool.server.logs import configure_logs
from nightschool.store.api_keys import ApiKeys
from nightschool.store.audit import AuditLog
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from nightschool.store.registry import Registry
from nightschool.store.tenants import Quota, Tenants
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of
from tests.support.memory_setups import reader_bot, served

QUESTION = "Where does Ada live?"


@pytest.fixture(scope="module")
def bot(tmp_path_factory):
    return reader_bot(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def server(bot):
    with served(bot) as server:
        yield server


def ask(server, memory, *calls, mode="auto"):
    """The answers of one client: what each tool says, or ("error", its message)."""

    async def session():
        answers = []
        async with Client(streamable_http_client(f"{server.url}/mcp/{memory}"), mode=mode) as client:
            for tool, arguments in calls:
                result = await client.call_tool(tool, arguments)
                text = result.content[0].text
                answers.append(("error", text) if result.is_error else json.loads(text))
        return answers

    return asyncio.run(session())


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_what_a_client_writes_counts_for_the_next_chat_and_why_says_what_it_was_read_from(bot, server, mode):
    memory = f"friends-{mode}"
    assert httpx2.post(f"{server.url}/api/memories", json={"name": memory}).status_code == 201
    ada = {"name": "Ada", "entityType": "person", "observations": ["lives in Oslo"]}
    _, found, edited, history, why = ask(
        server,
        memory,
        ("create_entities", {"entities": [ada]}),
        ("search", {"query": "oslo"}),
        ("edit", {"entry": "m2", "text": "Ada lives in Rome."}),
        ("history", {"entry": "m2"}),
        ("why", {"question": QUESTION, "max_new_tokens": 6}),
        mode=mode,
    )
    assert [one["id"] for one in found["entries"]] == ["m2"]
    assert [one["value"] for one in history["entries"]] == ["Oslo", "Rome"]
    chat = {"model": "bot", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 6, "temperature": 0}
    said = httpx2.post(f"{server.url}/v1/chat/completions", json=chat | {"memory": {"name": memory}, "why": True})
    choice = said.json()["choices"][0]
    assert said.headers["x-memory-revision"] == f"{memory}@{edited['revision']}"
    assert (why["answer"], why["memory"]) == (choice["message"]["content"], said.json()["memory"][0])
    assert [(one["token"], one["from"]) for one in why["why"]] == [(one["token"], one["from"]) for one in choice["why"]]
    assert "Ada lives in Rome." in [one["text"] for one in why["memory"]["entries"]]


def test_why_of_a_model_whose_layers_read_names_the_entries_of_each_token(server):
    (why,) = ask(server, "facts", ("why", {"question": QUESTION, "model": "reader", "max_new_tokens": 4}))
    assert (why["memory"]["read"], len(why["why"])) == ("layers", 4)
    (entry,) = why["memory"]["entries"]
    assert {share["id"] for token in why["why"] for share in token["entries"]} == {entry["id"]}


def test_what_goes_wrong_is_told_by_the_tool_or_before_it(server):
    unknown, absent_model, endless, wrong = ask(
        server,
        "facts",
        ("history", {"entry": "m99"}),
        ("why", {"question": QUESTION, "model": "absent"}),
        ("why", {"question": QUESTION, "max_new_tokens": 100_000}),
        ("open_nodes", {"names": [1] * 100_000}),
    )
    assert "m99" in unknown[1]
    assert "absent" in absent_model[1]
    assert "bot@" in absent_model[1]
    assert "less than or equal" in endless[1]
    assert len(wrong[1]) < 1000, "one wrong name is told, not all of them"
    with pytest.raises(BaseExceptionGroup) as refused:
        ask(server, "absent", ("read_graph", {}))
    assert "There is no memory 'absent'" in str(_leaf(refused.value))


def _leaf(error):
    return _leaf(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def test_tools_run_off_the_event_loop(server, monkeypatch):
    seen = []

    def read(graph):
        seen.append(threading.current_thread())
        return {"entities": [], "relations": []}

    monkeypatch.setattr(KnowledgeGraph, "read", read)
    ask(server, "facts", ("read_graph", {}))
    assert server.thread not in seen
    assert len(seen) == 1


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home").ensure()
    for name in ("facts", "acme/theirs"):
        with MemoryStore.create(memory_path(home, name)) as store:
            store.add([NewEntry("Ada lives in Oslo.")], author="test")
    return home


@pytest.fixture
def client(home):
    with client_of(FakeSlot(), registry=Registry(home)) as client:
        yield client


def key_of(home, tenant="default", **more):
    return {"x-api-key": ApiKeys(home.database).create(tenant, by="test", **more)[1]}


def post(client, memory, method="tools/list", params=None, *, headers=None, **more):
    message = {"jsonrpc": "2.0", "id": 1, "method": method} | ({"params": params} if params else {}) | more
    return client.post(f"/mcp/{memory}", json=message, headers={"accept": "application/json"} | (headers or {}))


def call(client, memory, tool, headers=None, **arguments):
    answer = post(client, memory, "tools/call", {"name": tool, "arguments": arguments}, headers=headers)
    assert answer.status_code == 200, answer.text
    result = answer.json()["result"]
    return result["content"][0]["text"] if result["isError"] else result["structuredContent"]


def test_a_handshake_a_notification_and_what_is_no_message(client):
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    told = post(client, "facts", "initialize", hello).json()["result"]
    assert (told["protocolVersion"], told["serverInfo"]["name"]) == ("2025-06-18", "nightschool memory")
    accept = {"accept": "application/json"}
    taken = client.post("/mcp/facts", json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=accept)
    assert (taken.status_code, taken.content) == (202, b"")
    assert post(client, "facts", "no/such").json()["error"]["code"] == -32601
    for body in ({"id": 1}, [], {"jsonrpc": "2.0", "id": 1, "method": "ping", "colour": "red"}, {"jsonrpc": "1.0"}):
        refused = client.post("/mcp/facts", json=body, headers=accept)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, -32600)
    assert client.post("/mcp/facts", content="{", headers=accept).status_code == 422
    assert post(client, "facts", headers={"accept": "text/html"}).status_code == 406
    assert client.get("/mcp/facts").status_code == 405
    assert post(client, "facts", headers={"origin": "http://elsewhere.example"}).status_code == 403
    assert post(client, "facts", headers={"host": "rebound.example"}).status_code == 403


def test_a_body_is_bounded_as_elsewhere(home):
    with client_of(FakeSlot(), registry=Registry(home), max_body_bytes=1024) as client:
        refused = post(client, "facts", "tools/call", {"name": "add", "arguments": {"facts": ["x" * 2000]}})
        assert (refused.status_code, refused.json()["error"]["data"]["code"]) == (413, "body_too_large")


def test_each_tenant_has_its_own_memories_and_only_what_changed_is_noted(client, home):
    ours, theirs = key_of(home), key_of(home, "acme")
    assert post(client, "theirs", headers=ours).json() == {
        "jsonrpc": "2.0",
        "id": None,
        "error": post(client, "facts", headers=theirs).json()["error"]
        | {
            "message": "There is no memory 'theirs'. GET /api/memories lists those that are there; POST /api/memories makes one."
        },
    }
    assert "Oslo" in str(call(client, "theirs", "read_graph", theirs))
    call(client, "theirs", "add", theirs, facts=["Ada lives in Oslo."])
    call(client, "theirs", "delete_entities", theirs, entityNames=["Nobody"])
    assert [row.action for row in AuditLog(home.database).ls() if row.action.startswith("memory")] == []
    call(client, "theirs", "add", theirs, facts=["Ada lives in Rome."])
    (noted,) = [row for row in AuditLog(home.database).ls() if row.action == "memory.mcp"]
    assert (noted.target, noted.tenant) == ("theirs", "acme")
    (written,) = call(client, "theirs", "search", theirs, query="rome")["entries"]
    assert written["author"] == f"key:{noted.key_id}"
    assert "Oslo" in str(call(client, "facts", "read_graph", ours))


def test_a_key_needs_the_scopes_of_what_it_does(client, home):
    may_ask, may_write = key_of(home, scopes={"infer"}), key_of(home, scopes={"memory"})
    assert post(client, "facts", headers=may_ask).status_code == 403
    assert "Oslo" in str(call(client, "facts", "read_graph", may_write))
    assert "No model of yours is served" in call(client, "theirs", "why", key_of(home, "acme"), question=QUESTION)
    assert "lacks the scope 'infer'" in call(client, "facts", "why", may_write, question=QUESTION)


def test_why_is_bounded_by_the_tenants_tokens(client, home):
    Tenants(home.database).add("acme", Quota(tokens_per_day=0), by="test")
    assert "tokens generated a day" in call(client, "theirs", "why", key_of(home, "acme"), question=QUESTION)


def test_without_the_package_the_answer_says_what_to_install(client, monkeypatch):
    monkeypatch.setattr("nightschool.server.memories.mcp_routes.http_server", memory_mcp.http_server.__wrapped__)
    monkeypatch.setitem(sys.modules, "nightschool.memory.mcp.http", None)
    answer = post(client, "facts")
    assert (answer.status_code, answer.json()["error"]["data"]["code"]) == (501, "not_installed")
    assert "pip install 'nightschool[mcp]'" in answer.json()["error"]["message"]


def _imported_at_once(path):
    """The modules that a module imports when it is itself imported."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_sdk_is_imported_when_a_client_asks():
    """Nobody who starts a server or types a command waits for it, but those who use it."""
    source = Path(memory_mcp.__file__).parents[2]
    takes_it = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        for name in _imported_at_once(path)
        if name.partition(".")[0] in ("mcp", "mcp_types") or name in _WITH_THE_SDK
    }
    assert takes_it == {"memory/mcp/tools.py", "memory/mcp/http.py"}


_WITH_THE_SDK = {"nightschool.memory.mcp.tools", "nightschool.memory.mcp.http"}


def test_lines_of_the_sdk_are_bounded_and_json():
    names = ("nightschool", "uvicorn", "asyncio", "mcp")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        configure_logs("info")
        assert not logging.getLogger("mcp.server.lowlevel").isEnabledFor(logging.INFO)
        assert not loggers[-1].propagate
        assert [len(handler.filters) for handler in loggers[-1].handlers] == [1]
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
