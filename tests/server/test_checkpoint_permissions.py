"""A fine-tuned model is asked by those tenants alone that its owner lets, through OpenAI's unmodified client."""

import openai
import pytest

from nightschool.errors import NotFound
from nightschool.feedback.conversations import ConversationStore
from nightschool.store.audit import AuditLog
from nightschool.store.checkpoint_permissions import CheckpointPermissions, FineTuned
from nightschool.store.home import Home
from nightschool.store.principal import SCOPES
from nightschool.store.registry import Registry
from nightschool.store.tenant_removal import belongings, remove_tenant
from tests.support.cli_home import add_version
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import eventually, live

NAME = "acme/towns-0123456789ab"
MODEL = "ft:base:acme:towns:0123456789ab"
CHAT = [{"role": "user", "content": "Who lives in Ulm?"}]
KEYS = {"acme": SCOPES, "other": SCOPES, "third": ("infer", "train"), "worker": ("infer", "train")}


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home").ensure()
    version = add_version(home, name=NAME)
    Registry(home).promote(NAME, version.id, by="test")
    return home


@pytest.fixture
def clients(home):
    keys = [
        {"key": f"key-of-{who}", "tenant": "acme" if who == "worker" else who, "scopes": scopes}
        for who, scopes in KEYS.items()
    ]
    slots = [FakeSlot(NAME), FakeSlot("acme/secret-bot")]
    kept = ConversationStore(home.database)
    more = {"registry": Registry(home), "api_keys": keys, "conversations": kept, "record_conversations": True}
    with live(slots, **more) as server:
        made = {who: openai.OpenAI(base_url=f"{server.url}/v1", api_key=f"key-of-{who}", max_retries=0) for who in KEYS}
        yield made
        for client in made.values():
            client.close()


def ask(client, model=MODEL):
    return client.chat.completions.create(model=model, messages=CHAT)


def permissions(client):
    return client.fine_tuning.checkpoints.permissions


def is_kept(home, answer):
    try:
        return ConversationStore(home.database).get(answer.id) is not None
    except NotFound:
        return False


def refused(client, model=MODEL):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model)
    said = str(caught.value).replace(model, "ASKED")
    assert "acme" not in said
    return said


def test_a_permission_from_its_making_to_its_end(home, clients):
    acme, other = clients["acme"], clients["other"]
    before = refused(other)
    made = permissions(acme).create(MODEL, project_ids=["other", "other", "nobody"])
    assert [one.project_id for one in made.data] == ["other", "nobody"]
    [again] = permissions(acme).create(MODEL, project_ids=["other"]).data
    assert again.id == made.data[0].id
    theirs, own = ask(other), ask(acme)
    assert theirs.model == own.model
    assert theirs.model.startswith(f"{NAME}@")
    eventually(lambda: is_kept(home, own), 30)
    assert not is_kept(home, theirs), "one thread writes in the order of the answers"
    refused(clients["third"])
    for model in (NAME, NAME.partition("/")[2], f"{MODEL}:ckpt-step-2", "acme/secret-bot"):
        refused(other, model)
    listed = [one.project_id for one in permissions(acme).list(MODEL, order="ascending", limit=1)]
    assert listed == ["other", "nobody"], "page after page"
    assert [one.project_id for one in permissions(acme).list(MODEL, project_id="nobody")] == ["nobody"]
    gone = permissions(acme).delete(made.data[0].id, fine_tuned_model_checkpoint=MODEL)
    assert (gone.id, gone.deleted) == (made.data[0].id, True)
    assert refused(other) == before
    with pytest.raises(openai.NotFoundError, match="no permission"):
        permissions(acme).delete(made.data[0].id, fine_tuned_model_checkpoint=MODEL)
    noted = [(row.action, row.tenant) for row in AuditLog(home.database).ls() if row.action.startswith("permission.")]
    assert set(noted) == {("permission.create", "acme"), ("permission.delete", "acme")}
    assert len(noted) == 3, "what found nothing changed nothing"


def test_nobody_but_an_administrator_of_the_owner_gives_or_sees_permissions(clients):
    theirs = permissions(clients["acme"]).create(MODEL, project_ids=["third"]).data[0]
    said = set()
    for model in (MODEL, "ft:base:acme:absent:0123456789ab", "towns"):
        for call in (
            lambda model: permissions(clients["other"]).create(model, project_ids=["other"]),
            lambda model: permissions(clients["other"]).list(model),
            lambda model: permissions(clients["other"]).delete(theirs.id, fine_tuned_model_checkpoint=model),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                call(model)
            said.add(str(caught.value).replace(model, "ASKED"))
    assert len(said) == 1, "told the same of what is another's and of what is nobody's"
    for call in (
        lambda: permissions(clients["worker"]).create(MODEL, project_ids=["third"]),
        lambda: permissions(clients["worker"]).list(MODEL),
        lambda: permissions(clients["worker"]).delete(theirs.id, fine_tuned_model_checkpoint=MODEL),
    ):
        with pytest.raises(openai.PermissionDeniedError):
            call()
    with pytest.raises(openai.NotFoundError):
        permissions(clients["acme"]).create(f"{MODEL}:ckpt-step-2", project_ids=["third"])


@pytest.mark.parametrize("projects", [[], ["acme"], ["../acme"], ["A B"], ["x" * 65], ["x"] * 101])
def test_what_is_no_other_tenant_is_refused(clients, projects):
    with pytest.raises(openai.BadRequestError):
        permissions(clients["acme"]).create(MODEL, project_ids=projects)
    assert list(permissions(clients["acme"]).list(MODEL)) == []


def test_what_a_removed_tenant_gave_and_was_given_goes_with_it(home):
    kept = CheckpointPermissions(home.database)
    own, shared = FineTuned("gone", "bot-0123456789ab", "champion"), FineTuned("acme", "bot-0123456789ab", "champion")
    kept.grant(own, ["acme"])
    kept.grant(shared, ["gone", "other"])
    assert sum(belongings(home, "gone").rows.values()) == 2
    remove_tenant(home, "gone", by="test")
    assert kept.ls(own) == []
    assert [one.project for one in kept.ls(shared)] == ["other"]
