"""Names of several tenants in one home: `name` is the default tenant's, `acme/name` another's."""

import os

import pytest

from nightschool.errors import Conflict, NameRefused, NotFound
from nightschool.store.home import Home
from nightschool.store.names import full_name, lock_path, model_path, parse_ref, split_name, tenants_of, version_path
from nightschool.store.registry import Registry, VersionMetadata
from nightschool.store.runs import RunStore

ID = "20261121_023000"


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


def publish(registry, name, **facts):
    return registry.publish(
        name, lambda folder: (folder / "model.txt").write_text(name) and None, VersionMetadata(**facts)
    )


def test_the_default_tenant_is_never_shown():
    assert split_name("bot") == split_name("default/bot") == ("default", "bot")
    assert full_name("default", "bot") == "bot"
    assert full_name(*split_name("acme/bot")) == "acme/bot"
    assert str(parse_ref("default/bot@latest")) == "bot@latest"


def test_a_reference_may_name_a_tenant():
    ref = parse_ref(f"acme/bot@{ID}")
    assert (ref.tenant, ref.name, ref.version, ref.alias) == ("acme", "acme/bot", ID, None)
    assert (parse_ref("acme/bot").alias, parse_ref("bot").tenant) == ("champion", "default")


@pytest.mark.parametrize("name", ["/bot", "acme/", "a/b/c", "../bot", "acme/..", "Acme/bot", "acme/b ot", "/", "a//b"])
def test_a_name_cannot_leave_its_tenant_or_the_home(home, name):
    for look in (
        lambda: model_path(home, name),
        lambda: version_path(home, name, ID),
        lambda: lock_path(home, "cycle", name),
        lambda: parse_ref(name),
        lambda: RunStore(home).create({}, name=name),
        lambda: RunStore(home).at(f"{name}-{ID}"),
        lambda: Registry(home).versions(name),
    ):
        with pytest.raises(NameRefused):
            look()


def test_names_of_two_tenants_are_two_names(home):
    registry = Registry(home)
    ours, theirs = publish(registry, "bot"), publish(registry, "acme/bot")
    registry.promote("bot", ours.id, by="test")
    assert registry.resolve("bot").ref == f"bot@{ours.id}"
    with pytest.raises(NotFound, match="'acme/bot' has no champion yet"):
        registry.resolve("acme/bot")
    registry.promote("acme/bot", theirs.id, by="test")
    found = registry.resolve("acme/bot")
    assert (found.ref, found.facts.name) == (f"acme/bot@{theirs.id}", "acme/bot")
    assert (found.path / "model.txt").read_text() == "acme/bot"
    assert found.path == home.path / "tenants" / "acme" / "models" / "bot" / theirs.id
    assert ours.path == home.models / "bot" / ours.id
    assert (registry.names(), registry.names("acme"), tenants_of(home)) == (
        ["bot", "acme/bot"],
        ["acme/bot"],
        ["default", "acme"],
    )
    registry.remove("bot", publish(registry, "bot").id)
    assert len(registry.versions("acme/bot")) == 1


def test_what_is_missing_names_nothing_of_other_tenants(home):
    registry = Registry(home)
    publish(registry, "acme/secret-project")
    with pytest.raises(NotFound) as caught:
        registry.resolve("bot")
    assert "secret" not in str(caught.value)


def test_a_base_on_which_an_adapter_of_another_tenant_stands_stays(home):
    registry = Registry(home)
    base = publish(registry, "bot")
    publish(registry, "bot")
    adapter = publish(registry, "acme/bot", kind="adapter", base=base.ref)
    with pytest.raises(Conflict, match=f"is the base of {adapter.ref}"):
        registry.remove("bot", base.id)


def test_runs_belong_to_the_tenant_of_their_name(home):
    store = RunStore(home)
    ours, theirs = store.create({"name": "bot"}, name="bot"), store.create({"name": "acme/bot"}, name="acme/bot")
    assert theirs.id == f"acme/bot-{theirs.id[-15:]}"
    assert theirs.path.parent == home.path / "tenants" / "acme" / "runs"
    for run in (ours, theirs):
        assert store.get(run.id) == run
        assert (run.home, run.status.name, run.status.run_id) == (home, run.name, run.id)
        assert store.containing(run.checkpoints_path / "checkpoint") == run
    assert {run.id for run in store.ls()} == {ours.id, theirs.id}
    assert store.ls("acme") == [theirs]
    store.remove(theirs.id)
    assert store.ls() == [ours]
    assert store.create({}, name="acme/bot").id != theirs.id, "the id of a removed run is never used again"
    assert store.containing(home.path / "elsewhere") is None


def test_locks_of_two_tenants_are_two_locks(home):
    paths = {lock_path(home, "cycle", name) for name in ("bot", "acme/bot", "acme/cycle-bot", "acme-bot")}
    assert len(paths) == 4
    assert all(os.path.commonpath([path, home.path]) == str(home.path) for path in paths)
