"""Names that nobody gave to the server: loaded by their first request, kept while they are asked for, one tenant's own."""

import asyncio
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pydantic import SecretStr
from safetensors.torch import load_file, save_file

from nightschool.engine.pool import EnginePool
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.engine.slot import Slot
from nightschool.errors import Conflict, NotFound, NotLoaded, SwapFailed
from nightschool.server import refresher
from nightschool.server.on_demand import OnDemand
from nightschool.server.served_names import ServedNames
from nightschool.server.settings import ApiKey
from nightschool.store.home import Home
from nightschool.store.principal import LOCAL
from nightschool.store.registry import Registry, VersionMetadata
from tests.support.adapter_setups import House, lively_adapter, save_adapter
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of, eventually


class School:
    """A home, its registry, and fake slots that serve what is promoted there."""

    def __init__(self, path):
        self.registry = Registry(Home(path).ensure())
        self.opened = []
        self.broken = {}
        self.gates = {}
        self.seconds_per_token = 0.0

    def publish(self, name, *, promote=True):
        version = self.registry.publish(name, lambda folder: None, VersionMetadata())
        if promote:
            self.registry.promote(name, version.id, by="test")
        return version

    def open_slot(self, key):
        self.opened.append(key)
        return _SchoolSlot(self, key)

    def client(self, **settings):
        default = _SchoolSlot(self, "default")
        more = {"registry": self.registry, "open_slot": self.open_slot}
        return client_of(default, keep_out=True, **more, **settings)

    def names(self, most=8):
        return ServedNames([_SchoolSlot(self, "default")], OnDemand(self.open_slot, most), self.registry)


class _SchoolSlot(FakeSlot):
    def __init__(self, school, key):
        name, _, self.version = key.partition("@")
        super().__init__(name, answer=lambda prompt: f"I am {key}.", seconds_per_token=school.seconds_per_token)
        self.school, self.key = school, key

    def refresh(self):
        gate = self.school.gates.get(self.key)
        assert gate is None or gate.wait(60)
        self.fails_with = self.school.broken.get(self.key)
        self.promoted = self.version or self.school.registry.resolve(self.name).id
        return super().refresh()


@pytest.fixture
def school(tmp_path):
    return School(tmp_path / "home")


def say(client, model):
    return client.post("/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": "?"}]})


def ask(client):
    """A question to no model in particular."""
    return client.post("/generate", json={"query": "?"})


def text(answer):
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["response"] if "response" in found else found["choices"][0]["message"]["content"]


def test_the_first_request_loads_a_name_once_and_the_next_ones_find_it(school):
    version = school.publish("bot")
    school.publish("cat")
    with school.client() as client:
        assert school.opened == []
        listed = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert listed == [id_ for name in ("bot", "cat") for id_ in (name, f"{name}@champion", _ref(school, name))]
        assert client.get("/readyz").json() == {"status": "ready", "model": None, "models": []}
        school.gates["bot"] = threading.Event()
        with ThreadPoolExecutor(8) as threads:
            answers = [threads.submit(say, client, "bot") for _ in range(8)]
            eventually(lambda: school.opened == ["bot"])
            # Nobody else waits for it.
            assert text(say(client, "cat")) == "I am cat."
            assert client.get("/healthz").status_code == 200
            school.gates["bot"].set()
            assert {text(answer.result()) for answer in answers} == {"I am bot."}
        assert say(client, "bot@champion").headers["x-model-version"] == version.ref
        assert school.opened == ["bot", "cat"]
        assert client.get("/readyz").json()["models"] == [_ref(school, "cat"), version.ref]


def _ref(school, name):
    return school.registry.resolve(name).ref


def test_a_home_without_a_model_says_so_until_there_is_one(school):
    with school.client() as client:
        assert (client.get("/health").json()["model_loaded"], client.get("/readyz").status_code) == (False, 200)
        answer = ask(client)
        assert (answer.status_code, answer.json()) == (503, {"detail": "Model not loaded"})
        assert client.get("/v1/models").json()["data"] == []
        for model in ("bot", "acme/bot", "../bot", "bot@", "bot@latest"):
            answer = say(client, model)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
            assert str(school.registry.home.path) not in answer.text
        unpromoted = school.publish("bot", promote=False)
        assert "has no champion yet" in say(client, "bot").json()["error"]["message"]
        assert text(say(client, unpromoted.ref)) == f"I am {unpromoted.ref}."
        school.registry.promote("bot", unpromoted.id, by="test")
        assert text(ask(client)) == "I am bot."


def test_the_name_default_is_served_as_soon_as_it_is_promoted(school, monkeypatch):
    monkeypatch.setattr(refresher, "_LOOK_SECONDS", 0.01)
    with school.client() as client:
        assert client.get("/health").json()["model_loaded"] is False
        version = school.publish("default")
        eventually(lambda: client.get("/health").json()["current_model_version"] == version.id)
        school.publish("bot")
        assert text(ask(client)) == "I am default."


def test_who_names_no_model_gets_the_tenants_only_one(school):
    keys = [ApiKey(key=SecretStr(f"key-of-{tenant}"), tenant=tenant) for tenant in ("acme", "zoo")]
    school.publish("zoo/bot")
    school.publish("acme/bot")
    with school.client(api_keys=keys) as client:
        client.headers["x-api-key"] = "key-of-acme"
        assert text(ask(client)) == text(say(client, "bot")) == text(say(client, "acme/bot")) == "I am acme/bot."
        school.publish("acme/cat")
        answer = ask(client)
        assert answer.status_code == 404
        assert "Name one of acme/bot, acme/cat" in answer.json()["detail"]
        school.publish("acme/default")
        assert text(ask(client)) == "I am acme/default."
        for model in ("zoo/bot", f"zoo/bot@{_ref(school, 'zoo/bot').partition('@')[2]}", "dog"):
            answer = say(client, model)
            assert answer.status_code == 404
            assert "zoo" not in answer.text.replace(f"The model '{model}'", "")
        shown = client.get("/api/settings").json()
        assert {model["name"] for model in shown["models"]} == {"acme/bot", "acme/default"}
        assert shown["max_loaded_names"] == 256
        client.headers["x-api-key"] = "key-of-zoo"
        assert text(say(client, "bot")) == "I am zoo/bot."


def test_beyond_the_bound_the_idle_name_that_was_asked_for_longest_ago_leaves(school):
    for name in ("a", "b", "c", "d"):
        school.publish(name)

    async def story():
        names = school.names(most=2)
        await names.load("a")
        await names.load("b")
        await names.find("a", LOCAL)
        await names.load("c")
        assert [slot.name for slot in names.loaded("default")] == ["a", "c"]
        a = names.get("a").current.engine
        c = names.get("c").current.engine
        for engine in (a, c):
            engine.load = lambda: (0, 1)
        await names.load("d")
        assert [slot.name for slot in names.loaded("default")] == ["a", "c", "d"], "busy ones stay"
        a.load = lambda: (0, 0)
        await names.load("b")
        assert [slot.name for slot in names.loaded("default")] == ["c", "b"]
        await names.close()
        assert a.closed
        assert list(names) == [names.first]

    asyncio.run(story())


def test_beyond_the_bytes_idle_names_leave_until_the_rest_fits(school):
    sizes = {"a": 10, "b": 30, "c": 40, "d": 100}
    for name in sizes:
        school.publish(name)

    def open_slot(key):
        slot = school.open_slot(key)
        slot.num_bytes = sizes[key]
        return slot

    async def story():
        on_demand = OnDemand(open_slot, 8, most_bytes=80)
        for name, expected in (("a", "a"), ("b", "ab"), ("c", "abc"), ("d", "d")):
            await on_demand.load(name)
            assert "".join(slot.name for slot in on_demand.slots()) == expected
        assert on_demand.num_evicted == 3
        await on_demand.close()

    asyncio.run(story())


def test_a_name_can_be_unloaded_and_is_loaded_again_when_it_is_asked_for(school):
    school.publish("bot")

    async def story():
        names = school.names()
        assert await names.unload("bot") is False
        slot = await names.load("bot")
        assert await names.unload("bot") is True
        assert slot.closed
        assert names.loaded("default") == []
        generation, _ = await names.resolve("bot", LOCAL)
        assert generation is not None
        with pytest.raises(Conflict, match="named when the server was started"):
            await names.unload("default")
        with pytest.raises(NotFound, match="no promoted version"):
            await names.load("nobody")
        with pytest.raises(NotLoaded):
            await ServedNames([FakeSlot("bot")]).resolve("bot", LOCAL)
        with pytest.raises(NotFound, match="Name it when you start"):
            await ServedNames([FakeSlot("bot")]).load("cat")
        await names.close()

    asyncio.run(story())


def test_who_waits_for_a_name_gets_it_though_the_first_one_who_asked_went_away(school):
    school.publish("bot")
    gate = school.gates["bot"] = threading.Event()

    async def story():
        names = school.names()
        first, second = asyncio.create_task(names.load("bot")), asyncio.create_task(names.load("bot"))
        while not school.opened:
            await asyncio.sleep(0.001)
        first.cancel()
        gate.set()
        assert (await second).current is not None
        assert school.opened == ["bot"]
        await names.close()

    asyncio.run(story())


def test_a_name_that_cannot_be_loaded_says_why_and_is_tried_again(school):
    school.publish("bot")
    school.broken["bot"] = SwapFailed("verify", "a byte is wrong")
    with school.client() as client:
        answer = say(client, "bot")
        assert answer.status_code == 409
        assert "a byte is wrong" in answer.text
        assert client.get("/api/settings").json()["models"] == [
            {"name": "default", "served_version": None, "last_refresh_error": None}
        ]
        del school.broken["bot"]
        assert text(say(client, "bot")) == "I am bot."


def test_a_promotion_is_served_within_a_look_though_nobody_asks(school, monkeypatch):
    monkeypatch.setattr(refresher, "_LOOK_SECONDS", 0.01)
    school.publish("bot")
    with school.client() as client:
        assert text(say(client, "bot")) == "I am bot."
        second = school.publish("bot")
        eventually(lambda: client.get("/readyz").json()["models"] == [second.ref])
        moved = client.post("/api/models/bot/rollback").json()
        assert moved["served_version"] == moved["champion"] != second.id


def test_two_versions_of_a_name_answer_side_by_side_and_neither_ends_with_the_other(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    house = House(tmp_path)
    pool = EnginePool(house.home, num_rows=4)
    house.registry.promote("bot", house.one.ref.partition("@")[2], by="test")

    def open_slot(key):
        name, _, version = key.partition("@")
        return Slot(name, pool, version or None)

    prompt = house.tokenizer.encode("abc")
    expected = {one.ref: house.tokenizer.decode(one.greedy(prompt, 12)) for one in (house.one, house.two)}
    default = Slot("default", pool)
    with client_of(default, registry=house.registry, open_slot=open_slot, max_loaded_names=1) as client:

        def ask(model):
            body = {"model": model, "prompt": "abc", "max_tokens": 12, "temperature": 0}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == expected[answer.json()["model"]]
            return answer.json()["model"]

        assert ask("bot") == house.one.ref
        assert ask(house.two.ref) == house.two.ref
        # `bot` was closed for it; now it moves to the version that is also served by itself, and that one is closed.
        house.registry.promote("bot", house.two.ref.partition("@")[2], by="test")
        assert ask("bot") == ask(house.two.ref) == ask("bot@champion") == house.two.ref
        assert ask(house.one.ref) == house.one.ref
        assert ask("bot") == house.two.ref
        assert len(pool._engines) == 1
    assert pool._engines == {}
    torch.set_num_threads(before)


def test_a_binding_that_two_hold_open_ends_with_the_second(tmp_path):
    house = House(tmp_path)
    pool = EnginePool(house.home, num_rows=2)
    name, version = house.one.ref.split("@")
    house.registry.promote(name, version, by="test")
    by_name, by_version = Slot(name, pool), Slot(name, pool, version)
    assert [by_name.refresh(), by_version.refresh()] == [True, True]
    engine, binding = by_name.current.engine, by_name.current.binding
    assert by_version.current.binding == binding
    house.registry.promote(name, house.two.ref.partition("@")[2], by="test")
    assert [by_name.refresh(), by_version.refresh()] == [True, False]
    by_name.close()
    greedily = SamplingParams(max_new_tokens=4, temperature=0)
    assert by_version.current.answers([([1, 2, 3], greedily)]) == [tuple(house.one.greedy([1, 2, 3], 4))]
    assert engine.num_active(binding) == 0
    by_version.close()
    with pytest.raises(NotLoaded):
        engine.submit(GenerationRequest("y", binding, [1, 2, 3], greedily))


class _Payload:
    def __reduce__(self):
        return open, ("executed", "w")


def _pickled(folder):
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(_Payload()))


def _pickled_beside(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.bin")


def _empty(folder):
    save_file({}, folder / "adapter_model.safetensors")


def _of_another_base(folder):
    save_adapter(lively_adapter("tiny-gpt-neox"), folder)


def _of_another_rank(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 64, "rank_pattern": {"q_proj": 3}}))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if ".lora_A." in name)
    save_file(tensors | {name: torch.zeros(9, tensors[name].shape[1])}, folder / "adapter_model.safetensors")


HOSTILE = {
    "a pickle in its place": (_pickled, "cannot be read"),
    "a pickle beside": (_pickled_beside, "read from safetensors only"),
    "nothing in it": (_empty, "holds no factors"),
    "another base": (_of_another_base, "does not fit its base"),
    "another rank": (_of_another_rank, "does not fit its base"),
}


@pytest.mark.parametrize(("spoil", "message"), HOSTILE.values(), ids=HOSTILE)
def test_an_adapter_that_is_none_is_refused_by_name_and_harms_nobody(spoil, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    house = House(tmp_path / "home")

    def fill(folder):
        save_adapter(lively_adapter(), folder, str(house.base.path))
        spoil(folder)

    bad = house.registry.publish("bad", fill, VersionMetadata(kind="adapter", base=house.base.ref))
    for name, version in (("bad", bad.id), ("cat", house.cat.ref.partition("@")[2])):
        house.registry.promote(name, version, by="test")
    pool = EnginePool(house.home, num_rows=2)
    with client_of(Slot("default", pool), registry=house.registry, open_slot=lambda name: Slot(name, pool)) as client:
        for _ in range(2):
            answer = client.post("/v1/completions", json={"model": "bad", "prompt": "abc", "max_tokens": 2})
            assert answer.status_code == 409, answer.text
            assert message in answer.json()["error"]["message"]
            assert str(tmp_path) not in answer.text
            assert (
                client.post("/v1/completions", json={"model": "cat", "prompt": "abc", "max_tokens": 2}).status_code
                == 200
            )
        engine = pool._engines[house.base.ref]
        assert len(engine._residents) == 2, "the base and cat's adapter"
    assert not (tmp_path / "executed").exists()
    assert pool._engines == {}
