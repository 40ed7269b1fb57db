"""Published versions over HTTP, with a real registry and a slot without tensors."""

import errno
import json
from pathlib import Path

import pytest

from nightschool.errors import SwapFailed
from nightschool.feedback.promotion import promote
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.store.versions import VersionMetadata
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of


@pytest.fixture
def registry(tmp_path):
    home = Home(tmp_path)
    home.ensure()
    return Registry(home)


def publish(registry, name="bot"):
    def fill(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    return registry.publish(name, fill, VersionMetadata())


@pytest.fixture
def versions(registry):
    first, second = publish(registry), publish(registry)
    registry.promote("bot", first.id, by="test")
    return [first, second]


class RegistrySlot(FakeSlot):
    """Serves what the registry calls the champion."""

    def __init__(self, registry):
        super().__init__(promoted=registry.resolve("bot").id)
        self.registry = registry

    def refresh(self):
        self.promoted = self.registry.resolve("bot").id
        return super().refresh()


def test_model_info_lists_every_version_newest_first(registry, versions):
    with client_of(RegistrySlot(registry), registry=registry) as client:
        listed = client.get("/model_info").json()["available_models"]
    assert [model["version"] for model in listed] == [versions[1].id, versions[0].id]
    assert listed[0]["path"] == str(versions[1].path.relative_to(registry.home.path))
    assert set(listed[0]) == {"path", "version", "modified_time"}


def test_a_damaged_version_does_not_hide_the_others(registry, versions):
    facts = versions[1].path / "nightschool.json"
    facts.chmod(0o644)
    facts.write_text("{")
    with client_of(RegistrySlot(registry), registry=registry) as client:
        assert len(client.get("/model_info").json()["available_models"]) == 2


def test_promote_serves_the_version_and_rollback_the_one_before(registry, versions):
    first, second = versions
    with client_of(RegistrySlot(registry), registry=registry) as client:
        moved = client.post("/api/models/bot/promote", json={"version": second.id})
        assert moved.json() == {"name": "bot", "champion": second.id, "served_version": second.id}
        assert client.post("/generate", json={"query": "a"}).json()["model_version"] == second.id
        assert registry.history("bot")[-1].by == "http"
        back = client.post("/api/models/bot/rollback")
        assert back.json() == {"name": "bot", "champion": first.id, "served_version": first.id}
        shown = client.get("/api/models/bot").json()
        assert shown["aliases"]["champion"] == first.id
        assert shown["served_version"] == first.id
        assert [model["name"] for model in client.get("/api/models").json()["models"]] == ["bot"]


def test_what_a_version_learned_leaves_the_pool_with_its_rollback_and_returns_with_its_promotion(registry):
    learned = []
    for number in range(2):
        run = RunStore(registry.home).create({}, name="bot")
        (run.path / "new_examples.jsonl").write_text(json.dumps({"text": f"fact {number}"}) + "\n")
        facts = VersionMetadata(run_id=run.id, parent=learned[0].ref if learned else None)
        learned.append(registry.publish("bot", lambda folder: (folder / "w").write_text("w") and None, facts))
    pool = AcceptedExamples(Database(registry.home).connect())
    promote(registry.home, "bot", learned[0].id, by="test")
    with client_of(RegistrySlot(registry), registry=registry) as client:
        client.post("/api/models/bot/promote", json={"version": learned[1].id})
        assert sorted(row["text"] for row in pool.shuffled("bot", 0)) == ["fact 0", "fact 1"]
        client.post("/api/models/bot/rollback")
        assert sorted(row["text"] for row in pool.shuffled("bot", 0)) == ["fact 0"]
        client.post("/api/models/bot/promote", json={"version": learned[1].id})
        assert len(pool.digests("bot")) == 2


def test_other_names_are_moved_without_touching_what_is_served(registry, versions):
    other = publish(registry, "other")
    with client_of(RegistrySlot(registry), registry=registry) as client:
        moved = client.post("/api/models/other/promote", json={"version": other.id})
        assert moved.json() == {"name": "other", "champion": other.id, "served_version": None}
        assert client.get("/health").json()["current_model_version"] == versions[0].id


def test_a_version_that_cannot_be_served_never_becomes_the_champion(registry, versions):
    slot = RegistrySlot(registry)
    with client_of(slot, registry=registry) as client:
        slot.fails_with = SwapFailed("probe", "it answers otherwise.")
        answer = client.post("/api/models/bot/promote", json={"version": versions[1].id})
        assert answer.status_code == 409
        assert "'probe'" in answer.json()["detail"]
        assert f"{versions[0].id} is still served" in answer.json()["detail"]
        assert registry.aliases("bot")["champion"] == versions[0].id
        assert [move.after for move in registry.history("bot") if move.alias == "champion"] == [versions[0].id]
        assert client.post("/generate", json={"query": "a"}).json()["model_version"] == versions[0].id


@pytest.mark.parametrize("name", ["nobody", "..", "%2e%2e%2fetc", "BOT", "bot@latest", "a%00b"])
def test_names_that_are_not_there_or_are_no_names_are_problems(registry, versions, name):
    with client_of(RegistrySlot(registry), registry=registry) as client:
        for answer in (
            client.get(f"/api/models/{name}"),
            client.post(f"/api/models/{name}/promote", json={"version": versions[0].id}),
            client.post(f"/api/models/{name}/rollback"),
        ):
            assert answer.status_code in (400, 404)
        assert client.post("/api/models/bot/promote", json={"version": "../../x"}).status_code in (400, 404)


def test_a_rollback_without_a_champion_before_is_a_conflict(registry, versions):
    with client_of(RegistrySlot(registry), registry=registry) as client:
        answer = client.post("/api/models/bot/rollback")
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"


def test_without_a_registry_it_says_so():
    with client_of(FakeSlot()) as client:
        assert client.get("/api/models").status_code == 409


def test_a_rollback_on_a_read_only_home_is_a_named_conflict(registry, versions, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(registry.home.path / "aliases.json"))

    promote(registry.home, "bot", versions[1].id, by="test")
    monkeypatch.setattr(Registry, "rollback", refuse)
    with client_of(RegistrySlot(registry), registry=registry) as client:
        answer = client.post("/api/models/bot/rollback")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert "aliases.json cannot be written: its file system is read-only. Make it writable" in answer.json()["detail"]
