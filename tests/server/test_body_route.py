"""Bodies that were made to keep the server busy: one pass, few errors, and never on the event loop."""

import json
import threading

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from pydantic import ValidationError, field_validator
from starlette.testclient import TestClient

from nightschool.server.app import FAMILIES
from nightschool.server.bodies import Body
from nightschool.server.body_route import BodyRoute
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of

BODIES = [route for router in FAMILIES for route in router.routes if isinstance(route, APIRoute) and route.body_field]
CHAT = {"model": "bot", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "bot", "prompt": "hi"}


def said(content):
    return CHAT | {"messages": [{"role": "user", "content": content}]}


HUGE = {
    "wrong token ids": ("/v1/completions", TEXT | {"prompt": [-1] * 400_000}, "prompt.token_ids.0"),
    "numbers that are no ids": ("/v1/completions", TEXT | {"prompt": [0.5] * 300_000}, "prompt.token_ids.0"),
    "objects for token ids": ("/v1/completions", TEXT | {"prompt": [{}] * 400_000}, "prompt.token_ids.0"),
    "more ids than any context": ("/v1/completions", TEXT | {"prompt": [1] * 300_000}, "prompt.token_ids"),
    "empty prompts": ("/v1/completions", TEXT | {"prompt": [[]] * 400_000}, "prompt.lists.0"),
    "many prompts": ("/v1/completions", TEXT | {"prompt": [""] * 400_000}, "prompt.texts"),
    "many stops": ("/v1/completions", TEXT | {"stop": [""] * 400_000}, "stop.texts.0"),
    "parts with an unknown key": (
        "/v1/chat/completions",
        said([{"type": "text", "text": "", "x": 1}] * 45_000),
        "messages.0.content.parts.0.x",
    ),
    "many parts": ("/v1/chat/completions", said([{"type": "text", "text": ""}] * 45_000), "messages.0.content.parts"),
    "messages that are none": ("/v1/chat/completions", CHAT | {"messages": [0] * 400_000}, "messages.0"),
    "many messages": ("/v1/chat/completions", CHAT | {"messages": CHAT["messages"] * 40_000}, "messages"),
    "wrong metadata": (
        "/v1/chat/completions",
        CHAT | {"metadata": {str(number): 0 for number in range(150_000)}},
        "metadata",
    ),
    "unknown fields": ("/v1/chat/completions", CHAT | {str(number): 0 for number in range(150_000)}, "0"),
    "a long unknown field": ("/v1/chat/completions", CHAT | {"m" * 1_900_000: 0}, "m" * 200),
    "a biased vocabulary": (
        "/v1/completions",
        TEXT | {"logit_bias": {str(number): 0 for number in range(150_000)}},
        "logit_bias",
    ),
    "many tools": ("/v1/chat/completions", CHAT | {"tools": [{}] * 400_000}, "tools"),
    "a query of lists": ("/generate", {"query": [[]] * 400_000}, "query"),
    "a version of lists": ("/api/models/bot/promote", {"version": [[]] * 400_000}, "version"),
    "a correction of lists": ("/api/feedback", {"request_id": "x", "correction": [[]] * 400_000}, "correction"),
}


@pytest.mark.parametrize(("path", "body", "param"), HUGE.values(), ids=HUGE)
def test_the_first_wrong_element_is_the_end_and_is_named(path, body, param):
    with client_of(FakeSlot()) as client:
        answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    content = answer.json()
    if path.startswith("/v1"):
        assert (answer.status_code, content["error"]["param"]) == (400, param)
    else:
        problem = content if path.startswith("/api") else {"param": content["detail"][0]["loc"][-1]}
        assert (answer.status_code, problem["param"]) == (422, param)
    assert len(answer.content) < 10_000, "a bounded number of errors was told"


def test_a_bounded_number_of_errors_is_even_looked_for():
    for path, body, _ in HUGE.values():
        [route] = [route for route in BODIES if route.path == path.replace("/bot/", "/{name}/")]
        model = route.body_field.field_info.annotation
        with pytest.raises(ValidationError) as caught:
            model.model_validate(body)
        assert caught.value.error_count() <= 20


def test_every_body_is_read_by_its_own_route_and_every_list_in_it_is_bounded():
    assert {route.path for route in BODIES} >= {"/generate", "/v1/completions", "/v1/chat/completions"}
    for route in BODIES:
        assert isinstance(route, BodyRoute), route.path
        model = route.body_field.field_info.annotation
        assert issubclass(model, Body)
        for node in _nodes(model.__pydantic_core_schema__):
            if node["type"] in ("list", "dict", "set", "tuple"):
                assert node.get("max_length"), f"{route.path} takes any number of {node}"
            if node["type"] == "list":
                assert node.get("fail_fast"), f"{route.path} collects the errors of all of {node}"


def _nodes(value):
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value
        for inner in value.values():
            yield from _nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _nodes(inner)


def test_a_large_body_is_never_validated_on_the_event_loop():
    threads = {}

    class Text(Body):
        text: str

        @field_validator("text")
        @classmethod
        def _seen(cls, text: str) -> str:
            threads.setdefault("validation", []).append(threading.get_ident())
            return text

    router = APIRouter(route_class=BodyRoute)

    @router.post("/texts")
    async def texts(body: Text) -> int:
        threads["loop"] = threading.get_ident()
        return len(body.text)

    app = FastAPI()
    app.include_router(router)
    with TestClient(app) as client:
        assert client.post("/texts", json={"text": "x" * 1_000_000}).json() == 1_000_000
        assert client.post("/texts", json={"text": "x"}).json() == 1
        assert client.post("/texts", content=b"", headers={"content-type": "application/json"}).status_code == 422
    large, _ = threads["validation"]
    assert large != threads["loop"]


WRONG = [
    0,
    -1,
    1.5,
    True,
    "",
    "x",
    [],
    [0],
    [[]],
    [[0]],
    [{}],
    {},
    {"x": 1},
    {"type": "text"},
    None,
    "\ud800",
    ["\ud800"],
]


@pytest.mark.parametrize("route", BODIES, ids=lambda route: route.path)
def test_what_is_told_of_a_wrong_value_is_nothing_of_our_own(route):
    model = route.body_field.field_info.annotation
    needed = {"/generate": {"query": "a"}, "/v1/completions": TEXT, "/v1/chat/completions": CHAT}.get(route.path, {})
    with client_of(FakeSlot(queue_limit=0)) as client:
        for name in model.model_fields:
            for value in WRONG:
                for wrong in (value, [value], [{"role": "user", "content": value}]):
                    content = json.dumps(needed | {name: wrong})
                    path = route.path.replace("{name}", "bot")
                    answer = client.post(path, content=content, headers={"content-type": "application/json"})
                    assert answer.status_code < 500, (name, wrong, answer.text)
                    for ours in (" at 0x", "object at", "function-", "_whole", "instance of"):
                        assert ours not in answer.text, (name, wrong, answer.text)
