"""Several names behind one server: `model` chooses, each name is promoted and refreshed by itself, and none is guessed."""

import asyncio
from dataclasses import replace
from urllib.parse import quote

import openai
import pytest
import torch
from pydantic import SecretStr

from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.errors import SwapFailed, UsageError
from nightschool.server.served_names import ServedNames
from nightschool.server.settings import ApiKey
from nightschool.store.home import Home
from nightschool.store.principal import LOCAL, Principal
from nightschool.store.registry import Registry, VersionMetadata
from tests.support.adapter_setups import House
from tests.support.engine_setups import greedy
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of, eventually, live, server_log

BOT, CAT = "20260101_000000", "20260202_000000"


@pytest.fixture
def slots():
    return [
        FakeSlot("bot", promoted=BOT, answer=lambda prompt: "I am bot."),
        FakeSlot("cat", promoted=CAT, answer=lambda prompt: "I am cat."),
    ]


def say(client, model, **more):
    return client.post(
        "/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": "?"}]} | more
    )


@pytest.mark.parametrize("model", ["cat", "cat@champion", f"cat@{CAT}"])
def test_the_model_of_a_request_chooses_who_answers_and_the_labels_say_so(slots, model):
    with client_of(slots) as client:
        answer = say(client, model)
        assert answer.json()["choices"][0]["message"]["content"] == "I am cat."
        assert answer.headers["x-model-version"] == f"cat@{CAT}"
        assert answer.json()["system_fingerprint"] == answer.json()["model"] == f"cat@{CAT}"
        assert say(client, "bot").headers["x-model-version"] == f"bot@{BOT}"


@pytest.mark.parametrize("model", ["dog", "cat@20250101_000000", "cat@latest", "cat@", "", "../bot", "bot\x1b[31m"])
def test_a_model_that_is_not_served_is_404_and_the_message_names_what_is(slots, model):
    with client_of(slots) as client:
        answer = say(client, model)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert f"bot@{BOT}, cat@{CAT}" in error["message"]
        assert "ask for 'bot' or 'cat'" in error["message"]
        assert "\x1b" not in error["message"]
        assert client.get(f"/v1/models/{quote(model, safe='') or 'x'}").status_code == 404


def test_the_models_are_listed_each_with_its_version(slots):
    with live(slots) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        expected = ["bot", "bot@champion", f"bot@{BOT}", "cat", "cat@champion", f"cat@{CAT}"]
        assert [model.id for model in client.models.list()] == expected
        assert [client.models.retrieve(model).id for model in expected] == expected
        completion = client.completions.create(model="cat", prompt="x", max_tokens=20)
        assert completion.choices[0].text == "I am cat."
        stream = client.chat.completions.create(model="cat", messages=[{"role": "user", "content": "x"}], stream=True)
        assert "".join(event.choices[0].delta.content or "" for event in stream) == "I am cat."
        with pytest.raises(openai.NotFoundError, match="ask for 'bot' or 'cat'"):
            client.completions.create(model="gpt-4", prompt="x")


def test_the_parametric_memory_api_speaks_of_the_first_name_unless_told_otherwise(slots):
    with client_of(slots) as client:
        assert client.get("/health").json()["current_model_version"] == BOT
        assert client.get("/model_info").json()["current_model_version"] == BOT
        assert client.get("/model_info", params={"model": "cat"}).json()["current_model_version"] == CAT
        assert client.post("/generate", json={"query": "?"}).json()["response"] == "I am bot."
        assert client.post("/generate", json={"query": "?", "model": "cat"}).json()["response"] == "I am cat."
        for method, path, more in (
            ("POST", "/generate", {"json": {"query": "?", "model": "dog"}}),
            ("GET", "/model_info", {"params": {"model": "dog"}}),
            ("POST", "/refresh_model", {"params": {"model": "dog"}}),
        ):
            answer = client.request(method, path, **more)
            assert answer.status_code == 404
            assert "'dog' is not served" in answer.json()["detail"]


def test_a_refresh_moves_one_name_and_the_watcher_looks_at_all(slots):
    bot, cat = slots
    with client_of(slots) as client:
        assert (bot.refreshes, cat.refreshes) == (1, 1)
        bot.promoted = cat.promoted = "20260303_000000"
        assert client.post("/refresh_model").json()["current_model_version"] == "20260303_000000"
        assert say(client, "cat").headers["x-model-version"] == f"cat@{CAT}"
        client.get("/refresh_model", params={"model": "cat"})
        assert say(client, "cat").headers["x-model-version"] == "cat@20260303_000000"
    with client_of(slots, model_check_interval=0.01):
        before = cat.refreshes
        eventually(lambda: cat.refreshes > before + 2)


def test_a_name_that_cannot_be_refreshed_does_not_stop_the_others(slots):
    bot = slots[0]
    bot.fails_with = SwapFailed("probe", "it answers otherwise")
    with server_log() as log, client_of(slots) as client:
        assert say(client, "cat").status_code == 200
        answer = say(client, "bot")
        assert answer.status_code == 503
        assert client.get("/readyz").status_code == 503
        models = {model["name"]: model for model in client.get("/api/settings").json()["models"]}
        assert "answers otherwise" in models["bot"]["last_refresh_error"]
        assert models["cat"] == {"name": "cat", "served_version": CAT, "last_refresh_error": None}
        assert [row["name"] for row in log.rows if row.get("message") == "error updating the model"] == ["bot"]
        bot.fails_with = None
        client.get("/refresh_model")
        ready = client.get("/readyz").json()
        assert ready == {"status": "ready", "model": f"bot@{BOT}", "models": [f"bot@{BOT}", f"cat@{CAT}"]}


def test_a_name_is_served_once_and_none_is_no_server():
    with pytest.raises(UsageError, match="given bot, bot"):
        ServedNames([FakeSlot("bot"), FakeSlot("bot")])
    with pytest.raises(UsageError, match="given none"):
        ServedNames([])


def test_what_answers_is_bound_to_the_tenant_that_asks(slots):
    slots.append(FakeSlot("acme/cat", promoted=BOT))
    names = ServedNames([slot.serve(slot.promoted) for slot in slots])
    acme = Principal("acme", frozenset({"infer"}))
    for principal, version in ((LOCAL, CAT), (acme, BOT)):
        generation, binding = asyncio.run(names.resolve("cat", principal))
        assert (generation.version.id, binding.tenant) == (version, principal.tenant)
    _, binding = asyncio.run(names.resolve("acme/cat", replace(acme, key="digest")))
    assert (binding.label, binding.tenant) == (f"acme/cat@{BOT}", "acme"), "all keys of a tenant have one turn"
    assert binding.key == "digest", "two keys share no cached prefix"


def test_names_of_other_tenants_are_404(slots, tmp_path):
    registry = Registry(Home(tmp_path / "home"))
    for name in ("bot", "acme/dog", "zoo/cat"):
        registry.publish(name, lambda folder: None, VersionMetadata())
    slots.append(FakeSlot("acme/dog", promoted=BOT, answer=lambda prompt: "I am dog."))
    keys = [ApiKey(key=SecretStr(f"key-of-{tenant}"), tenant=tenant) for tenant in ("default", "acme", "zoo")]
    with client_of(slots, registry=registry, api_keys=keys) as client:
        asked = {}
        for tenant in ("default", "acme", "zoo"):
            client.headers["x-api-key"] = f"key-of-{tenant}"
            for model in ("bot", "dog", "acme/dog"):
                answer = say(client, model)
                asked[tenant, model] = answer.status_code
                if answer.status_code == 404 and tenant != "default":
                    assert "'bot'" not in answer.text.replace("The model 'bot'", "")
            listed = {card["id"].partition("@")[0] for card in client.get("/v1/models").json()["data"]}
            assert listed == {"default": {"bot", "cat"}, "acme": {"acme/dog"}, "zoo": set()}[tenant]
            known = {model["name"] for model in client.get("/api/models").json()["models"]}
            assert known == {"default": {"bot"}, "acme": {"acme/dog"}, "zoo": {"zoo/cat"}}[tenant]
            for path in ("/api/models/dog", "/model_info?model=dog", "/v1/models/acme%2Fdog"):
                found = client.get(path).status_code
                assert (found == 200) == (tenant == "acme" and "%2F" not in path), (tenant, path, found)
            assert client.post("/api/models/dog/promote", json={"version": "latest"}).status_code == (
                200 if tenant == "acme" else 404
            )
            assert client.get("/api/settings").status_code == (404 if tenant == "zoo" else 200)
    assert {key for key, status in asked.items() if status == 200} == {
        ("default", "bot"),
        ("acme", "dog"),
        ("acme", "acme/dog"),
    }


def test_a_base_and_two_adapters_behind_one_server_answer_each_as_it_would_alone(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    house = House(tmp_path)
    pool = EnginePool(house.home, num_rows=4)
    served = {"base": house.base.ref, "bot": house.one.ref, "cat": house.cat.ref}
    for name, ref in served.items():
        house.registry.promote(name, ref.partition("@")[2], by="test")
    tokenizer = house.tokenizer
    models = {"base": house.model, "bot": house.one.model, "cat": house.cat.model}
    expected = {n: tokenizer.decode(greedy(m, tokenizer.encode("abc"), 12)) for n, m in models.items()}
    slots = [Slot(name, pool) for name in served]
    with live(slots) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        for name, ref in served.items():
            answer = client.completions.create(model=name, prompt="abc", max_tokens=12, temperature=0)
            assert (answer.choices[0].text, answer.model) == (expected[name], ref)
        assert len(set(expected.values())) == 3
        assert len(pool._engines) == 1
    torch.set_num_threads(before)


def test_a_name_is_merged_over_http_and_nobody_elses(slots):
    with client_of(slots) as client:
        answer = client.post("/api/models/cat/merge", json={"merged": True})
        assert answer.json() == {"name": "cat", "merged": True, "changed": True, "served_version": CAT}
        assert [slot.merged for slot in slots] == [False, True]
        assert client.post("/api/models/cat/merge", json={"merged": True}).json()["changed"] is False
        assert client.post("/api/models/dog/merge", json={"merged": True}).status_code == 404
        assert client.post("/api/models/cat/merge", json={}).status_code == 422
