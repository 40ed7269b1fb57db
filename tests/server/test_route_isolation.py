"""What one tenant has does not exist for another, on every route there is.

Each route is asked by another tenant for what acme has, and for what nobody has: the answers are the same, and none holds
a word of acme's. A new route fails until the tables here say what its parameters are.
"""

import json
import re

import pytest
from starlette.routing import Route

from nightschool.feedback.conversations import ConversationStore
from nightschool.memory.entity_ids import EntityIds
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.server.app import create_app, routes_of
from nightschool.server.settings import ServerSettings
from nightschool.store.api_keys import ApiKeys
from nightschool.store.audit import AuditLog
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from nightschool.store.registry import Registry
from tests.support.cli_home import add_version
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of

SECRET = "zebra"
"""Stands in every name and text of acme's."""
MINE, NOBODYS = "acme's", "nobody's"
OF_ZEBRA = EntityIds("zebra")
# What stands in a path, by parameter: what acme has, and what nobody has.
PARAMETERS = {
    "name": ("zebra-bot", "absent-bot"),
    "model": ("zebra-bot", "absent-bot"),
    "request_id": ("zebra-request", "absent-request"),
    "file_id": ("file-zebra00000000000000", "file-absent0000000000000"),
    "endpoint_id": ("whe_zebra", "whe_absent"),
    "training_id": ("train_zebra0000000", "train_absent000000"),
    "org_id": ("acme", "absent-org"),
    "fine_tuning_job_id": ("ftjob-zebra", "ftjob-absent"),
    "job_id": ("ftjob-zebra", "ftjob-absent"),
    "checkpoint": ("zebra-bot", "absent-bot"),
    "fine_tuned_model_checkpoint": ("zebra-bot", "absent-bot"),
    "permission_id": ("cp_zebra", "cp_absent"),
    "entry": ("m1", "m2"),
    "memory_id": (f"{OF_ZEBRA.memory('zebra-bot')}-m1", f"{OF_ZEBRA.memory('absent-bot')}-m1"),
    "version": ("zebra-version", "absent-version"),
}
CHAT = [{"role": "user", "content": "hi"}]
TRAIN = [{"messages": [*CHAT, {"role": "assistant", "content": "ho"}]}]
# What must be sent, by route; `$name` becomes acme's name or nobody's. Others take an empty object.
BODIES = {
    "/generate": {"query": "a", "model": "$name"},
    "/v1/chat/completions": {"model": "$name", "messages": CHAT},
    "/v1/completions": {"model": "$name", "prompt": "a"},
    "/api/feedback": {"request_id": "$request_id", "rating": "good"},
    "/api/models/{name}/promote": {"version": "20261121_023000"},
    "/api/memories": {"name": "$name"},
    "/api/memories/{name}/rollback": {"to": "$version"},
    "/api/memories/{name}/versions": {"name": "$version"},
    "/api/memories/{name}/conflicts/resolve": {"a": "m1", "b": "m2", "keep": "a"},
    "/api/memories/{name}/relations": {"relation": "lives in", "cardinality": "multi"},
    "/api/memories/{name}/entries": {"entries": [{"text": "Ada lives in Oslo."}]},
    "/api/memories/{name}/entries/{entry}": {"value": "Oslo"},
    "/mcp/{name}": {"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
    "/mem0/{name}/v3/memories/add/": {"messages": CHAT, "user_id": "zebra"},
    "/mem0/{name}/v3/memories/": {"filters": {"user_id": "zebra"}},
    "/mem0/{name}/v3/memories/search/": {"query": "oslo", "filters": {"user_id": "zebra"}},
    "/mem0/{name}/v1/memories/{memory_id}/": {"text": "Ada lives in Rome."},
    "/api/v1/generate": {"message": "a"},
    "/api/v1/training/start": {"org_id": "$org_id", "conversations": TRAIN},
    "/api/v1/training/preview": {"org_id": "$org_id", "conversations": TRAIN},
    "/api/v1/training/evaluate": {"org_id": "$org_id", "model_id": "latest"},
}
# What is asked for beside the path.
QUERIES = {
    "/api/memories/{name}/diff": "?before=$version",
    "/api/memories/{name}/search": "?q=zebra",
    "/mem0/{name}/v1/memories/": "?user_id=zebra",
    "/model_info": "?model=$name",
    "/refresh_model": "?model=$name",
    "/api/v1/generate": "?org_id=$org_id",
    "/api/v1/models/load": "?org_id=$org_id",
    "/api/v1/models/unload": "?org_id=$org_id",
}


def every_route():
    app = create_app([FakeSlot()], ServerSettings())
    return sorted(
        (method, route.path)
        for route in routes_of(app)
        if isinstance(route, Route)
        for method in route.methods - {"HEAD"}
    )


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home").ensure()
    version = add_version(home, name="acme/zebra-bot")
    Registry(home).promote("acme/zebra-bot", version.id, by="test")
    chat = [{"role": "user", "content": "zebra"}]
    ApiKeys(home.database).create("default", by="test")
    with MemoryStore.create(memory_path(home, "acme/zebra-bot")) as memory:
        memory.add([NewEntry("The zebra lives in Oslo.")], author="test")
        memory.name_version("zebra-version", author="test")
    with MemoryStore.create(memory_path(home, f"acme/{OF_ZEBRA.memory('zebra-bot')}")) as memory:
        memory.add([NewEntry("The zebra lives in Oslo.")], author="test")
    ConversationStore(home.database).record("zebra-request", "acme/zebra-bot", version.id, chat, "zebra", "key")
    return home


@pytest.fixture
def client(home):
    slots = [FakeSlot("acme/zebra-bot"), FakeSlot("other/bot")]
    conversations = ConversationStore(home.database)
    with client_of(
        slots, registry=Registry(home), conversations=conversations, record_conversations=True, host="0.0.0.0"
    ) as client:
        yield client


def filled(template, which):
    place = (MINE, NOBODYS).index(which)
    for name, values in PARAMETERS.items():
        template = re.sub(rf"\{{{name}(:\w+)?\}}|\${name}\b", values[place], template)
    return template


def told(answer, which):
    """What an answer says, without what was asked for and what differs from one request to the next."""
    text = answer.text
    for values in PARAMETERS.values():
        text = re.sub(rf"\b{re.escape(values[(MINE, NOBODYS).index(which)])}\b", "ASKED", text)
    return answer.status_code, re.sub(
        r"(chatcmpl|cmpl|gen|req)-[0-9a-f]{24}|\d{4}-\d\d-\d\dT[\d:.+]+|\d+\.\d+", "", text
    )


@pytest.mark.parametrize(("method", "template"), every_route(), ids=" ".join)
def test_another_tenant_is_told_what_it_would_be_told_if_there_were_nothing(client, home, method, template):
    unknown = set(re.findall(r"\{(\w+)", template)) - PARAMETERS.keys()
    assert not unknown, f"say in PARAMETERS what acme has under {unknown}"
    headers = {"x-api-key": ApiKeys(home.database).create("other", by="test")[1], "host": "127.0.0.1"}
    heard = {}
    for which in (MINE, NOBODYS):
        path = filled(template + QUERIES.get(template, ""), which)
        body = filled(json.dumps(BODIES.get(template, {})), which)
        more = {"content": body} if method in ("POST", "PUT", "PATCH") else {}
        answer = client.request(method, path, headers=headers | {"content-type": "application/json"}, **more)
        assert answer.status_code < 500, answer.text
        heard[which] = told(answer, which)
        assert SECRET not in heard[which][1], (answer.status_code, answer.text)
        assert "acme" not in heard[which][1]
    assert heard[MINE] == heard[NOBODYS]
    stored = ConversationStore(home.database).get("zebra-request")
    assert (stored.rating, stored.messages[0]["content"]) == (None, "zebra")
    assert [row.tenant for row in AuditLog(home.database).ls() if row.tenant == "acme"] == []
    assert Registry(home).champion("acme/zebra-bot") is not None
    for name in ("zebra-bot", OF_ZEBRA.memory("zebra-bot")):
        with MemoryStore.open(memory_path(home, f"acme/{name}")) as memory:
            assert (memory.revision, [entry.text for entry in memory.entries()]) == (1, ["The zebra lives in Oslo."])


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/health", "/metrics"])
def test_who_has_no_key_hears_of_no_tenant(client, path):
    answer = client.get(path)
    assert answer.status_code == (401 if path == "/metrics" else 200)
    assert SECRET not in answer.text
    assert "acme" not in answer.text
