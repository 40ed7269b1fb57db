"""The registry by its behaviour: publish, resolve, promote, roll back, pin, remove."""

import json
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from nightschool.errors import Conflict, Damaged, NameRefused, NotFound
from nightschool.store.home import Home
from nightschool.store.registry import Registry, VersionMetadata


def fill(folder):
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")


@pytest.fixture
def registry(tmp_path):
    return Registry(Home(tmp_path / "home"))


def publish(registry, count=1, name="bot", **facts):
    return [registry.publish(name, fill, VersionMetadata(**facts)) for _ in range(count)]


def test_a_published_version_is_whole_read_only_and_latest(registry):
    facts = VersionMetadata(
        kind="adapter",
        method="lora",
        base="./base",
        parent="bot@20260101_000000",
        run_id="bot-20260101_000000",
        heldout_loss=1.5,
        probes=[{"prompt_ids": [1, 2], "expected_ids": [3]}],
    )
    version = registry.publish("bot", fill, facts)
    assert version == registry.resolve("bot@latest") == registry.resolve(version.ref)
    found = registry.resolve(version.ref)
    assert (found.facts.name, found.facts.version, found.facts.probes) == ("bot", version.id, facts.probes)
    assert found.facts == VersionMetadata.model_validate_json((version.path / "nightschool.json").read_text())
    manifest = found.verify()
    assert set(manifest.files) == {"model.safetensors", "config.json", "nightschool.json"}
    assert (manifest.facts["parent"], manifest.facts["heldout_loss"]) == ("bot@20260101_000000", 1.5)
    assert all(not stat.S_IMODE(path.stat().st_mode) & 0o222 for path in version.path.iterdir())
    assert registry.names() == ["bot"]


def test_a_version_that_cannot_be_filled_is_not_published(registry):
    def fail(folder):
        fill(folder)
        raise ValueError("export differs")

    with pytest.raises(ValueError, match="export differs"):
        registry.publish("bot", fail, VersionMetadata())
    assert registry.names() == []
    assert registry.versions("bot") == []


def test_a_half_written_version_is_invisible(registry):
    (version,) = publish(registry)
    (registry.home.models / "bot" / "20990101_000000").mkdir()
    (registry.home.models / "bot" / "20990101_000001.partial").mkdir()
    assert registry.versions("bot") == [version]
    with pytest.raises(NotFound):
        registry.resolve("bot@20990101_000000")


def test_version_ids_are_the_time_and_move_on(registry, monkeypatch):
    monkeypatch.setattr("nightschool.store.registry_entry.now", lambda: datetime(2026, 11, 21, 2, 30, tzinfo=UTC))
    assert [registry.new_version_id("bot") for _ in range(3)] == [
        "20261121_023000",
        "20261121_023001",
        "20261121_023002",
    ]
    assert registry.new_version_id("other") == "20261121_023000"
    # A clock that went back must not make an older-looking newest version.
    monkeypatch.setattr("nightschool.store.registry_entry.now", lambda: datetime(2026, 1, 1, tzinfo=UTC))
    assert registry.new_version_id("bot") == "20261121_023003"


def test_an_id_is_published_once_and_never_again(registry):
    version = registry.new_version_id("bot")
    registry.publish("bot", fill, VersionMetadata(version=version))
    with pytest.raises(Conflict, match="nothing is ever written over"):
        registry.publish("bot", fill, VersionMetadata(version=version))
    registry.remove("bot", version)
    with pytest.raises(Conflict, match="was removed"):
        registry.publish("bot", fill, VersionMetadata(version=version))
    with pytest.raises(Conflict, match="never given out"):
        registry.publish("bot", fill, VersionMetadata(version="20200101_000000"))
    assert registry.new_version_id("bot") > version


def test_concurrent_publishers_get_different_versions(registry):
    gate = threading.Barrier(6)

    def fill_together(folder):
        gate.wait(60)
        fill(folder)

    with ThreadPoolExecutor(6) as pool:
        versions = list(pool.map(lambda _: registry.publish("bot", fill_together, VersionMetadata()), range(6)))
    assert len({version.id for version in versions}) == 6
    assert {version.id for version in registry.versions("bot")} == {version.id for version in versions}
    assert registry.aliases("bot")["latest"] == max(version.id for version in versions)


def test_what_is_not_there_says_what_is(registry):
    with pytest.raises(NotFound, match="Nothing was published yet"):
        registry.resolve("bot")
    (version,) = publish(registry)
    with pytest.raises(NotFound, match="There are bot"):
        registry.resolve("bto")
    with pytest.raises(NotFound, match=rf"no champion yet.*{version.id}"):
        registry.resolve("bot")
    with pytest.raises(NotFound, match=rf"no 'bot@nightly'.*latest, {version.id}"):
        registry.resolve("bot@nightly")
    with pytest.raises(NotFound, match=rf"{version.id}"):
        registry.resolve("bot@20200101_000000")
    with pytest.raises(NameRefused):
        registry.resolve("../bot")


def test_promotion_and_rollback_walk_the_history(registry):
    a, b, c = publish(registry, 3)
    with pytest.raises(Conflict, match=r"no previous champion to go back to \(champion: none\)"):
        registry.rollback("bot", by="ann")
    for version in (a, b, c):
        assert registry.promote("bot", version.id, by="night") == version
    registry.promote("bot", "latest", by="night")  # again: no move
    assert registry.resolve("bot") == c
    assert registry.aliases("bot") == {"champion": c.id, "previous": b.id, "latest": c.id}
    assert registry.rollback("bot", by="ann") == b
    assert registry.aliases("bot") == {"champion": b.id, "previous": a.id, "latest": c.id}
    assert registry.rollback("bot", by="ann") == a
    with pytest.raises(Conflict, match=rf"\(champion: {a.id}\)"):
        registry.rollback("bot", by="ann")
    registry.promote("bot", c.id, by="ann")
    assert registry.aliases("bot")["previous"] == a.id
    assert [(move.by, move.action, move.before, move.after) for move in registry.history("bot")] == [
        ("night", "promote", None, a.id),
        ("night", "promote", a.id, b.id),
        ("night", "promote", b.id, c.id),
        ("ann", "rollback", c.id, b.id),
        ("ann", "rollback", b.id, a.id),
        ("ann", "promote", a.id, c.id),
    ]


def test_a_rollback_passes_over_what_was_removed(registry):
    a, b, c = publish(registry, 3)
    for version in (a, b, c, a, c):
        registry.promote("bot", version.id, by="x")
    registry.remove("bot", b.id)
    # champions were a b c a c
    assert [registry.rollback("bot", by="x").id for _ in range(3)] == [a.id, c.id, a.id]
    with pytest.raises(Conflict, match="no previous"):
        registry.rollback("bot", by="x")


def test_a_rollback_of_an_unknown_name(registry):
    with pytest.raises(NotFound):
        registry.rollback("bot", by="x")


def test_a_pinned_champion_does_not_move(registry):
    a, b, c = publish(registry, 3)
    registry.promote("bot", a.id, by="x")
    assert registry.pinned("bot") is None
    assert registry.pin("bot", b.id, by="ann") == b
    assert registry.resolve("bot") == registry.pinned("bot") == b
    for move in (
        lambda: registry.promote("bot", c.id, by="night"),
        lambda: registry.rollback("bot", by="x"),
        lambda: registry.pin("bot", c.id),
    ):
        with pytest.raises(Conflict, match=rf"pinned to {b.id}, so it does not move to .*Unpin 'bot' first"):
            move()
    registry.promote("bot", b.id, by="night")  # where it is already
    with pytest.raises(Conflict, match="champion and pinned"):
        registry.remove("bot", b.id)
    registry.unpin("bot")
    with pytest.raises(Conflict, match="not pinned"):
        registry.unpin("bot")
    assert registry.rollback("bot", by="x") == a


def test_aliases_of_the_users_own(registry):
    a, b = publish(registry, 2)
    registry.set_alias("bot", "stable", a.id)
    assert registry.resolve("bot@stable") == a
    registry.set_alias("bot", "stable", "latest")
    assert registry.resolve("bot@stable") == b
    with pytest.raises(Conflict, match="stable"):
        registry.remove("bot", b.id)
    registry.remove_alias("bot", "stable")
    with pytest.raises(NotFound, match="no alias 'stable'"):
        registry.remove_alias("bot", "stable")
    for alias in ("champion", "latest", "previous"):
        with pytest.raises(Conflict, match="cannot be set by hand"):
            registry.set_alias("bot", alias, a.id)
    for alias in ("20261121_023000", "../x", ""):
        with pytest.raises(NameRefused):
            registry.set_alias("bot", alias, a.id)


def test_what_is_in_use_is_not_removed(registry):
    a, b, c = publish(registry, 3)
    registry.promote("bot", a.id, by="x")
    registry.promote("bot", b.id, by="x")
    with pytest.raises(Conflict, match=rf"bot@{b.id} is champion, so it stays"):
        registry.remove("bot", b.id)
    with pytest.raises(Conflict, match=rf"bot@{a.id} is previous, so it stays"):
        registry.remove("bot", a.id)
    (adapter,) = publish(registry, name="child", kind="adapter", base=c.ref)
    with pytest.raises(Conflict, match=rf"the base of {adapter.ref}"):
        registry.remove("bot", c.id)
    registry.remove("child", adapter.id)
    registry.remove("bot", c.id)
    assert [version.id for version in registry.versions("bot")] == [b.id, a.id]
    assert registry.names() == ["bot"]
    with pytest.raises(NotFound):
        registry.remove("bot", c.id)


def test_a_damaged_version_is_neither_promoted_nor_rolled_back_to(registry):
    a, b = publish(registry, 2)
    registry.promote("bot", a.id, by="x")
    registry.promote("bot", b.id, by="x")
    weights = a.path / "model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"weighTs")
    for move in (
        lambda: registry.promote("bot", a.id, by="x"),
        lambda: registry.rollback("bot", by="x"),
        lambda: registry.pin("bot", a.id),
    ):
        with pytest.raises(Damaged, match=r"model\.safetensors has the SHA-256"):
            move()
    assert registry.resolve("bot") == b


def test_damaged_facts_are_named_and_hide_no_other_version(registry):
    a, b = publish(registry, 2)
    path = a.path / "nightschool.json"
    path.chmod(0o600)
    for change, match in (({"kind": "soul"}, "wrong kind"), ({"version": b.id}, "lies in the folder of")):
        content = json.loads((b.path / "nightschool.json").read_text()) | {"version": a.id} | change
        path.write_text(json.dumps(content))
        assert len(registry.versions("bot")) == 2
        with pytest.raises(Damaged, match=match):
            registry.resolve(a.ref).facts  # noqa: B018
    assert registry.resolve(b.ref).facts.version == b.id


def test_facts_of_a_newer_nightschool_are_read(registry):
    assert VersionMetadata.model_validate({"name": "bot", "invented_later": 1}).name == "bot"
    with pytest.raises(ValueError, match="finite"):
        VersionMetadata(heldout_loss=float("nan"))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"aliases": {"../x": "20261121_023000"}},
        {"aliases": {"champion": "../../etc"}},
        {"aliases": {}},
        {"history": [{}]},
        {"issued": None},
    ],
)
def test_damaged_aliases_are_refused_by_name(registry, change):
    (version,) = publish(registry)
    registry.promote("bot", version.id, by="x")
    path = registry.home.models / "bot" / "aliases.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(Damaged, match=r"aliases\.json"):
        registry.resolve("bot")


def test_a_champion_that_was_deleted_by_hand_can_be_rolled_back(registry):
    a, b = publish(registry, 2)
    registry.promote("bot", a.id, by="x")
    registry.promote("bot", b.id, by="x")
    b.path.rename(registry.home.path / "gone")
    with pytest.raises(NotFound, match="deleted by hand"):
        registry.resolve("bot")
    assert registry.rollback("bot", by="x") == a


def test_readers_beside_a_busy_publisher_always_find_a_champion(registry):
    publish(registry)
    registry.promote("bot", "latest", by="x")
    done, errors = threading.Event(), []

    def read():
        while not done.is_set():
            try:
                for ref in ("bot", "bot@latest"):
                    registry.resolve(ref).facts  # noqa: B018
            except Exception as error:
                errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(40):
        publish(registry)
        registry.promote("bot", "latest", by="x")
    done.set()
    for reader in readers:
        reader.join()
    assert errors == []


def test_reports(registry):
    (version,) = publish(registry)
    with pytest.raises(NotFound, match="has not examined it"):
        registry.load_report("bot", version.id)
    path = registry.save_report("bot", version.id, {"decision": "refuse"})
    assert (
        path
        == registry.report_path("bot", version.id)
        == registry.home.models / "bot" / "reports" / f"{version.id}.json"
    )
    assert registry.load_report("bot", version.id) == {"decision": "refuse"}
    registry.remove("bot", version.id)
    assert registry.load_report("bot", version.id) == {"decision": "refuse"}
    with pytest.raises(NameRefused):
        registry.report_path("bot", "../../x")


def test_reading_a_home_that_does_not_exist(registry):
    assert registry.names() == []
    assert registry.versions("bot") == []
    assert registry.aliases("bot") == {}
    assert registry.history("bot") == []
    assert not registry.home.path.exists()
