"""The parametric-memory API, rows 000-30 … 000-37, and what is wrong with the original in them."""

from datetime import datetime

import pytest

from nightschool.errors import SwapFailed
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of, eventually, server_log

VERSION = "20251202_115436"


def is_timestamp(text: str) -> bool:
    return datetime.fromisoformat(text).tzinfo is not None and len(text.split(".")[1].split("+")[0]) == 6


def test_generate_has_exactly_the_promised_fields():
    with client_of(FakeSlot(answer=lambda prompt: "Paris")) as client:
        answer = client.post("/generate", json={"query": "Capital of France?"})
    assert answer.status_code == 200
    body = answer.json()
    assert is_timestamp(body.pop("timestamp"))
    assert body == {"query": "Capital of France?", "response": "Paris", "model_version": VERSION}
    assert answer.headers["x-model-version"] == f"bot@{VERSION}"
    assert answer.headers["x-request-id"].startswith("gen-")


def test_generate_uses_the_promised_defaults_and_hands_on_what_was_asked():
    slot = FakeSlot()
    with client_of(slot) as client:
        client.post("/generate", json={"query": "a"})
        client.post("/generate", json={"query": "a", "max_new_tokens": 3.0, "temperature": 0, "top_p": 0.5})
    first, second = (handle.request.params for handle in slot.current.engine.handles)
    assert (first.max_new_tokens, first.temperature, first.top_p) == (256, 0.7, 0.9)
    assert (second.max_new_tokens, second.temperature, second.top_p) == (3, 0, 0.5)


def test_the_question_reaches_the_model_in_its_chat_template():
    seen = []
    with client_of(FakeSlot(answer=lambda prompt: seen.append(prompt) or "x")) as client:
        client.post("/generate", json={"query": "Wer bist du?"})
    assert "user\nWer bist du?" in seen[0]
    assert seen[0].rstrip().endswith("assistant")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": 1_000_000},
        {"max_new_tokens": 1.5},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"query": ""},
        {"query": None},
        {"query": 7},
        {"top_p": True},
        {"temperature": "0.5"},
        {"max_new_tokens": "5"},
        {"temprature": 0.5},
    ],
)
def test_values_out_of_bounds_are_422_and_name_the_field(wrong):
    with client_of(FakeSlot()) as client:
        answer = client.post("/generate", json={"query": "a"} | wrong)
        assert answer.status_code == 422
        [problem] = answer.json()["detail"]
        assert problem["loc"] == ["body", next(iter(wrong))]
        assert client.post("/generate", json={"query": "a"}).status_code == 200


def test_a_missing_query_is_422_and_an_unknown_field_names_the_nearest():
    with client_of(FakeSlot()) as client:
        assert client.post("/generate", json={}).json()["detail"][0]["type"] == "missing"
        message = client.post("/generate", json={"query": "a", "max_tokens": 5}).json()["detail"][0]["msg"]
    assert message == "There is no such parameter. Did you mean 'max_new_tokens'?"


def test_a_prompt_that_does_not_fit_is_refused_with_both_lengths():
    with client_of(FakeSlot(context_tokens=60)) as client:
        answer = client.post("/generate", json={"query": "x" * 100, "max_new_tokens": 10})
        assert answer.status_code == 400
        assert "119 tokens" in answer.json()["detail"]
        assert "holds 60" in answer.json()["detail"]
        whole = client.post("/generate", json={"query": "x", "max_new_tokens": 50})
        assert whole.status_code == 400, "an explicit length is never shortened silently"
        assert client.post("/generate", json={"query": "x"}).status_code == 200, "the default adapts to the context"


def test_a_prompt_that_is_far_too_long_is_refused_early_and_one_that_just_fits_is_not():
    with client_of(FakeSlot(context_tokens=50_000)) as client:
        answer = client.post("/v1/completions", json={"model": "bot", "prompt": "x " * 900_000})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "holds 50000" in answer.json()["error"]["message"]
        fits = {"model": "bot", "prompt": "x " * 24_999, "max_tokens": 2}
        assert client.post("/v1/completions", json=fits).json()["usage"]["prompt_tokens"] == 49_998
        assert client.post("/v1/completions", json=fits | {"max_tokens": 3}).status_code == 400


def test_without_a_model_it_serves_503_and_stays_healthy():
    with client_of(FakeSlot(promoted=None)) as client:
        for answer in (client.post("/generate", json={"query": "a"}), client.get("/model_info")):
            assert answer.status_code == 503
            assert answer.json() == {"detail": "Model not loaded"}
        health = client.get("/health")
        assert health.status_code == 200
        body = health.json()
        assert is_timestamp(body.pop("timestamp"))
        assert body.pop("device") in ("cpu", "cuda")
        assert body == {
            "status": "healthy",
            "model_loaded": False,
            "current_model_version": None,
            "current_model_path": None,
        }


def test_health_with_a_model_has_exactly_the_six_fields():
    with client_of(FakeSlot()) as client:
        body = client.get("/health").json()
    assert list(body) == [
        "status",
        "model_loaded",
        "current_model_version",
        "current_model_path",
        "timestamp",
        "device",
    ]
    assert body["model_loaded"] is True
    assert body["current_model_version"] == VERSION
    assert body["current_model_path"] == f"models/bot/{VERSION}", "never where the home lies"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_refresh_finds_a_promoted_version_at_once(method):
    slot = FakeSlot(promoted=None)
    with client_of(slot) as client:
        assert client.get("/readyz").status_code == 503
        slot.promoted = "20260101_000000"
        answer = client.request(method, "/refresh_model")
        assert answer.status_code == 200
        body = answer.json()
        assert is_timestamp(body.pop("timestamp"))
        assert body == {
            "status": "success",
            "message": "Model refresh completed",
            "current_model_version": "20260101_000000",
            "current_model_path": "models/bot/20260101_000000",
        }
        assert client.post("/generate", json={"query": "a"}).json()["model_version"] == "20260101_000000"


def test_a_failed_refresh_is_500_is_counted_and_the_old_version_serves_on():
    slot = FakeSlot()
    with server_log() as log, client_of(slot) as client:
        slot.fails_with = SwapFailed("verify", "model.safetensors has other bytes.")
        answer = client.get("/refresh_model")
        assert answer.status_code == 500
        assert answer.json()["detail"].startswith("Model refresh failed: The swap failed at the stage 'verify'")
        assert client.post("/generate", json={"query": "a"}).json()["model_version"] == VERSION
        assert 'nightschool_refreshes_total{outcome="failed"} 1.0' in client.get("/metrics").text
        assert "other bytes" in client.get("/api/settings").json()["last_refresh_error"]
        slot.fails_with = None
        assert client.get("/refresh_model").status_code == 200
        assert client.get("/api/settings").json()["last_refresh_error"] is None
    [error] = [row for row in log.rows if row["level"] == "error"]
    assert error["still_serving"] == f"bot@{VERSION}"


def test_the_watcher_looks_at_once_and_again_after_the_interval():
    slot = FakeSlot()
    with client_of(slot, model_check_interval=0.05) as client:
        slot.promoted = "20260101_000000"
        eventually(lambda: client.get("/health").json()["current_model_version"] == "20260101_000000")
        slot.fails_with = RuntimeError("the disk went away")
        before = slot.refreshes
        eventually(lambda: slot.refreshes > before + 1)
        slot.fails_with, slot.promoted = None, "20260202_000000"
        eventually(lambda: client.get("/health").json()["current_model_version"] == "20260202_000000")


def test_a_failure_while_generating_is_500_with_its_reason():
    slot = FakeSlot(fails_with=RuntimeError("out of rows"))
    with client_of(slot) as client:
        answer = client.post("/generate", json={"query": "a"})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "Generation failed: out of rows"}


def test_a_request_that_meets_a_swap_is_answered_by_one_version():
    slot = FakeSlot()
    with client_of(slot) as client:
        old = slot.current
        old.engine.closed = True  # drained between rendering and submission
        original = old.engine.submit

        def submit(request):
            slot.serve("20260101_000000")
            return original(request)

        old.engine.submit = submit
        answer = client.post("/generate", json={"query": "a"})
    assert answer.status_code == 200
    assert answer.json()["model_version"] == "20260101_000000"


def test_model_info_without_a_registry_lists_nothing():
    with client_of(FakeSlot()) as client:
        body = client.get("/model_info").json()
    assert body["current_model_version"] == VERSION
    assert body["tokenizer_vocab_size"] == 259
    assert is_timestamp(body["last_updated"])
    assert body["available_models"] == []
