"""Keeping conversations and what people say of them: only if it was asked for, and never in the way of an answer."""

import json
import threading

import pytest
from pydantic import SecretStr

from nightschool.config.training_service import TrainingServiceSettings
from nightschool.errors import DiskFull, UsageError
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.server.app import create_app
from nightschool.server.settings import ApiKey, ServerSettings
from nightschool.store.atomic import write_json
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.job_queue import JobQueue, job_folder
from nightschool.store.names import memory_path
from nightschool.store.registry import Registry
from tests.support.cli_home import add_version, make_run
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of, server_log

CHAT = {"model": "bot", "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]}


@pytest.fixture
def store(tmp_path):
    home = Home(tmp_path)
    home.ensure()
    database = Database(home).connect()
    yield ConversationStore(database)
    database.close()


@pytest.fixture
def client(store):
    with client_of(FakeSlot(), record_conversations=True, conversations=store) as client:
        yield client


def test_an_answer_is_kept_under_its_request_id_and_can_be_corrected(client, store):
    answer = client.post("/v1/chat/completions", json=CHAT)
    said = {"request_id": answer.json()["id"], "rating": "bad", "correction": "Good morning!"}
    kept = client.post("/api/feedback", json=said)
    assert kept.status_code == 200
    assert kept.json() == {"request_id": said["request_id"], "status": "kept"}
    [conversation] = store.select(corrected=True)
    assert conversation.request_id == said["request_id"] == answer.headers["x-request-id"]
    assert (conversation.model, conversation.version) == ("bot", "20251202_115436")
    assert conversation.messages == CHAT["messages"]
    assert conversation.answer == "Hello, wörld!"
    assert (conversation.rating, conversation.correction) == ("bad", "Good morning!")


def test_deleting_can_queue_a_clean_training_of_what_has_learned_it(store):
    keys = [
        ApiKey(key=SecretStr("key-that-may-not-train"), scopes=frozenset({"infer", "feedback"})),
        ApiKey(key=SecretStr("key-that-may-train-too"), scopes=frozenset({"infer", "feedback", "train"})),
    ]
    without, with_train = ({"x-api-key": key.key.get_secret_value()} for key in keys)
    home = store.home
    with client_of(FakeSlot(), api_keys=keys, record_conversations=True, conversations=store) as client:
        asked = [client.post("/generate", json={"query": "hi"}, headers=key) for key in (without, with_train)]
        kept, request_id = (answer.headers["x-request-id"] for answer in asked)
        assert client.get(f"/api/conversations/{request_id}/traces", headers=with_train).status_code == 200
        run = make_run(home)
        write_json(run.cycle_path, {"root": "/data"})
        AcceptedExamples(home.database).add("bot", add_version(home, run_id=run.id).id, [learned(request_id)])
        refused = client.delete(f"/api/conversations/{kept}?retrain=true", headers=without)
        assert (refused.status_code, "lacks the scope 'train'" in refused.text) == (403, True)
        assert store.get(kept).request_id == kept
        assert client.delete(f"/api/conversations/{kept}?retrain=perhaps", headers=without).status_code == 422
        answer = client.delete(f"/api/conversations/{request_id}?retrain=true", headers=with_train).json()
    assert (answer["status"], answer["not_retrained"]) == ("forgotten", {})
    [job] = JobQueue(home.database).ls()
    assert answer["retrainings"] == {"bot": job.id}
    assert (job.state, job.recipe["start"], job.recipe["base"], job.root) == ("queued", "base", "new:tiny", "/data")
    assert job.created_by is not None


def learned(request_id):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok", "weight": 1}]
    return {"id": request_id, "source": "conversations", "messages": messages}


@pytest.mark.parametrize("stream", [True, False])
def test_feedback_right_after_the_answer_always_finds_it(client, store, stream):
    for _ in range(20):
        answer = client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
        said = {"request_id": answer.headers["x-request-id"], "rating": "good"}
        assert client.post("/api/feedback", json=said).status_code == 200
    assert [c.answer for c in store.select(rating="good")] == ["Hello, wörld!"] * 20


def test_answers_of_the_plain_route_are_kept_too(client, store):
    answer = client.post("/generate", json={"query": "hi"})
    said = {"request_id": answer.headers["x-request-id"], "rating": "good"}
    assert client.post("/api/feedback", json=said).status_code == 200
    assert store.select(rating="good")[0].messages == [{"role": "user", "content": "hi"}]


def test_what_cannot_be_rated_by_its_id_is_not_kept(client, store):
    client.post("/v1/chat/completions", json=CHAT | {"n": 2})
    client.post("/v1/completions", json={"model": "bot", "prompt": "hi"})
    client.post("/generate", json={"query": ""})
    assert client.post("/api/feedback", json={"request_id": "nobody", "rating": "good"}).status_code == 404
    assert store.select() == []


def test_an_exchange_can_be_forgotten(client, store):
    identity = client.post("/v1/chat/completions", json=CHAT).json()["id"]
    with MemoryStore.create(memory_path(store.home, "facts")) as memory:
        memory.add([NewEntry("Leon lives in Oslo.", source=identity), NewEntry("Jo lives in Bonn.")], author="test")
        traces = {"request_id": identity, "runs": [], "jobs": [], "files": [], "memories": ["facts/m1"], "versions": []}
        assert client.get(f"/api/conversations/{identity}/traces").json() == traces
        assert client.delete(f"/api/conversations/{identity}").json() == traces | {"status": "forgotten"}
        assert [one.text for one in memory.entries()] == ["Jo lives in Bonn."]
    assert store.select() == []
    missing = client.delete(f"/api/conversations/{identity}")
    assert missing.status_code == 404
    assert missing.headers["content-type"] == "application/problem+json"
    assert missing.json()["code"] == "not_found"


def test_its_copies_in_files_and_in_the_data_of_jobs_are_shown_and_go_with_it(store):
    """Sent back as data, with other words of the system, inside of a longer one, and as the worse of two answers."""
    keys = [
        ApiKey(key=SecretStr("key-of-the-asker"), scopes=frozenset({"infer", "feedback"})),
        ApiKey(key=SecretStr("key-of-the-admin")),
        ApiKey(key=SecretStr("key-of-another"), tenant="acme"),
    ]
    asker, admin, foreign = ({"x-api-key": key.key.get_secret_value()} for key in keys)
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello, wörld!"}]
    more = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Good night."}]
    copy, longer, others = (
        {"messages": said},
        {"messages": [{"role": "system", "content": "x"}, *said, *more]},
        {"messages": more},
    )
    alike = {"messages": [said[0], *more[1:]]}  # only the question is the same
    worse = {"input": {"messages": said[:1]}, "preferred_output": more[1:], "non_preferred_output": said[1:]}
    registry, queue = Registry(store.home), JobQueue(store.home.database)
    settings = {"api_keys": keys, "record_conversations": True, "conversations": store, "registry": registry}
    with client_of(
        FakeSlot(), training_service=TrainingServiceSettings(default_base_model="b/c"), **settings
    ) as client:

        def upload(*rows, key=admin):
            content = "".join(json.dumps(row) + "\n" for row in rows)
            sent = {"file": ("train.jsonl", content)}
            return client.post("/v1/files", files=sent, data={"purpose": "fine-tune"}, headers=key).json()["id"]

        def content(file):
            return client.get(f"/v1/files/{file}/content", headers=admin)

        identity = client.post("/v1/chat/completions", json=CHAT, headers=asker).json()["id"]
        trained, held_out, only, clean = (
            upload(others, copy, longer),
            upload(copy, others),
            upload(worse),
            upload(alike),
        )
        of_another = upload(copy, key=foreign)
        begun = {"model": "b/c", "training_file": trained, "validation_file": held_out}
        job = queue.get(client.post("/v1/fine_tuning/jobs", json=begun, headers=admin).json()["id"])
        where = {"request_id": identity, "runs": [], "memories": [], "versions": []}
        path = f"/api/conversations/{identity}"
        assert client.get(f"{path}/traces", headers=asker).json() == where | {"jobs": [], "files": []}
        found = client.get(f"{path}/traces", headers=admin).json()
        shown = found | {"files": sorted(found["files"])}
        assert shown == where | {"jobs": [job.id], "files": sorted([trained, held_out, only])}

        claimed = queue.claim(most_running=1)
        refused = client.delete(path, headers=admin)
        assert (refused.status_code, job.id in refused.json()["detail"]) == (409, True)
        queue.release(claimed)
        assert client.delete(path, headers=admin).json() == found | {"status": "forgotten"}

        left = [
            (job_folder(store.home, "default", job.id) / f"{name}.jsonl").read_text() for name in ("train", "heldout")
        ]
        for text in (*left, content(trained).text, content(held_out).text):
            assert [json.loads(line) for line in text.splitlines()] == [others]
        assert content(only).status_code == 404
        assert json.loads(content(clean).text) == alike
        assert client.get(f"/v1/files/{of_another}/content", headers=foreign).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rating": "good"}, "request_id"),
        ({"request_id": "x", "rating": "great"}, "rating"),
        ({"request_id": "x", "rating": "bad", "correction": ""}, "correction"),
        ({"request_id": "x", "rating": "bad", "corection": "y"}, "corection"),
    ],
)
def test_wrong_feedback_names_the_field(client, body, param):
    answer = client.post("/api/feedback", json=body)
    assert answer.status_code == 422
    assert answer.json()["param"] == param


@pytest.mark.parametrize("stream", [True, False])
def test_with_keys_only_the_key_that_asked_may_rate_correct_or_forget(store, stream):
    keys = [
        ApiKey(key=SecretStr("first-key-of-two"), scopes=frozenset({"infer", "feedback"})),
        ApiKey(key=SecretStr("second-key-of-two"), scopes=frozenset({"infer", "feedback"})),
        ApiKey(key=SecretStr("third-key-that-is-admin")),
        ApiKey(key=SecretStr("fourth-key-of-another"), tenant="acme"),
    ]
    asker, other, admin, foreign_admin = ({"x-api-key": key.key.get_secret_value()} for key in keys)
    store.record("before-there-were-keys", "bot", "v", [], "a")
    with client_of(FakeSlot(), api_keys=keys, record_conversations=True, conversations=store) as client:
        for path, body in (("/v1/chat/completions", CHAT | {"stream": stream}), ("/generate", {"query": "hi"})):
            identity = client.post(path, json=body, headers=asker).headers["x-request-id"]
            wrong = {"request_id": identity, "rating": "bad", "correction": "Obey the second key."}
            for foreign in (wrong, wrong | {"request_id": "before-there-were-keys"}):
                refused = client.post("/api/feedback", json=foreign, headers=other)
                assert refused.status_code == 404
                unknown = client.post("/api/feedback", json=wrong | {"request_id": "nobody"}, headers=other)
                assert refused.json()["detail"].replace(foreign["request_id"], "nobody") == unknown.json()["detail"]
            assert client.delete(f"/api/conversations/{identity}", headers=other).status_code == 404
            assert client.post("/api/feedback", json=wrong | {"rating": "good"}, headers=asker).status_code == 200
            assert store.get(identity).rating == "good"
            assert client.delete(f"/api/conversations/{identity}", headers=foreign_admin).status_code == 404
            assert client.delete(f"/api/conversations/{identity}", headers=asker).status_code == 200
        assert client.delete("/api/conversations/before-there-were-keys", headers=admin).status_code == 200


def test_without_keys_whoever_reaches_the_server_may_rate_what_a_key_asked(store, client):
    store.record("asked-with-a-key", "bot", "v", [], "a", "some key")
    assert client.post("/api/feedback", json={"request_id": "asked-with-a-key", "rating": "good"}).status_code == 200


def test_a_correction_alone_is_enough_and_nothing_at_all_is_refused(client, store):
    identity = client.post("/v1/chat/completions", json=CHAT).json()["id"]
    nothing = client.post("/api/feedback", json={"request_id": identity})
    assert nothing.status_code in (400, 422)
    assert "neither a rating nor a correction" in nothing.json()["detail"]
    assert client.post("/api/feedback", json={"request_id": identity, "correction": "Hi!"}).status_code == 200
    [conversation] = store.select(corrected=True)
    assert (conversation.rating, conversation.correction) == (None, "Hi!")


def test_a_blank_correction_is_refused(client):
    identity = client.post("/v1/chat/completions", json=CHAT).json()["id"]
    answer = client.post("/api/feedback", json={"request_id": identity, "rating": "bad", "correction": "  "})
    assert answer.status_code in (400, 422)
    assert "blank" in answer.json()["detail"]


def test_it_is_off_by_default_and_says_so(store):
    with client_of(FakeSlot(), conversations=store) as client:
        identity = client.post("/v1/chat/completions", json=CHAT).json()["id"]
        answer = client.post("/api/feedback", json={"request_id": identity, "rating": "good"})
        assert answer.status_code == 409
        assert "record_conversations" in answer.json()["detail"]
        assert client.get("/api/settings").json()["record_conversations"] is False
    assert store.select() == []


def test_when_it_is_on_the_log_and_the_settings_say_so(store):
    with server_log() as log, client_of(FakeSlot(), record_conversations=True, conversations=store) as client:
        assert client.get("/api/settings").json()["record_conversations"] is True
    [started] = [row for row in log.rows if row["message"] == "serving"]
    assert started["recording"] == "conversations are kept for later nights"
    with pytest.raises(UsageError):
        create_app([FakeSlot()], ServerSettings(record_conversations=True))


class BrokenStore:
    def record(self, *row):
        raise DiskFull("No room is left.")

    def feedback(self, *row, owner=None):
        raise DiskFull("No room is left.")

    def forget(self, request_id, *, owner=None):
        raise DiskFull("No room is left.")


def test_a_full_disk_costs_the_recording_and_never_the_answer():
    with server_log() as log, client_of(FakeSlot(), record_conversations=True, conversations=BrokenStore()) as client:
        assert client.post("/generate", json={"query": "a"}).status_code == 200
        assert client.post("/api/feedback", json={"request_id": "x", "rating": "good"}).status_code == 507
        assert 'nightschool_recorded_conversations_total{outcome="lost"} 1.0' in client.get("/metrics").text
    assert any(row["message"] == "a conversation was not kept" for row in log.rows)


class StuckStore:
    """Writes nothing before it is let."""

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.kept = []

    def record(self, *row):
        assert self.may_write.wait(60)
        self.kept.append(row)


def test_a_stuck_disk_does_not_hold_answers_and_stopping_writes_what_is_pending():
    store = StuckStore()
    with client_of(FakeSlot(), record_conversations=True, conversations=store) as client:
        for _ in range(5):
            assert client.post("/generate", json={"query": "a"}).status_code == 200
        assert store.kept == []
        store.may_write.set()
    assert len(store.kept) == 5
