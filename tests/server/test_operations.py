"""What operators see: health, readiness, metrics, logs; and that nothing blocks."""

import json
import threading
import time

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of, eventually, live, server_log


def figures(client) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_health_answers_while_a_model_loads_and_readiness_waits():
    """The load ends only after these answers: on the event loop it would hold them until they time out."""
    slot = FakeSlot()
    slot.may_load.clear()
    with live(slot) as server:
        try:
            assert slot.loading.wait(60)
            assert httpx2.get(f"{server.url}/healthz", timeout=30).status_code == 200
            assert httpx2.get(f"{server.url}/readyz", timeout=30).status_code == 503
            assert httpx2.get(f"{server.url}/health", timeout=30).json()["model_loaded"] is False
        finally:
            slot.may_load.set()
        eventually(lambda: slot.current)
        ref = "bot@20251202_115436"
        assert httpx2.get(f"{server.url}/readyz").json() == {"status": "ready", "model": ref, "models": [ref]}


def test_a_huge_prompt_is_refused_off_the_event_loop():
    slot = FakeSlot(context_tokens=100_000)
    threads = []
    with live(slot) as server:
        engine = slot.current.engine
        tokenize = engine.tokenizer
        engine.tokenizer = Watched(tokenize, lambda: threads.append(threading.get_ident()))
        answer = httpx2.post(f"{server.url}/generate", json={"query": "lorem " * 300_000}, timeout=60)
        loop = server.thread.ident
    assert answer.status_code == 400
    assert "at least 1" in answer.json()["detail"]
    assert "holds 100000" in answer.json()["detail"]
    assert threads
    assert loop not in threads


class Watched:
    """A tokenizer that says when it is asked for anything."""

    def __init__(self, tokenizer, tell) -> None:
        self._tokenizer, self._tell = tokenizer, tell

    def __call__(self, *args, **kwargs):
        self._tell()
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name):
        self._tell()
        return getattr(self._tokenizer, name)


def test_one_look_at_a_time_however_many_ask():
    slot = FakeSlot()
    running, most = 0, 0
    original = slot.refresh

    def refresh() -> bool:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)  # long enough for another one to come in, if it could
        try:
            return original()
        finally:
            running -= 1

    slot.refresh = refresh
    with live(slot) as server:
        statuses = []
        asking = [
            threading.Thread(target=lambda: statuses.append(httpx2.get(f"{server.url}/refresh_model").status_code))
            for _ in range(6)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    assert statuses == [200] * 6
    assert most == 1


def test_metrics_count_requests_tokens_and_swaps():
    slot = FakeSlot(answer=lambda prompt: "abc")
    with client_of(slot) as client:
        client.post("/generate", json={"query": "a"})
        client.post("/v1/completions", json={"model": "bot", "prompt": "hello", "stream": True})
        client.post("/generate", json={"query": ""})
        client.get("/v1/models/bot")
        client.get("/wp-login.php?x=1")
        client.get("/v1/models/what")
        found = figures(client)
        prompt_tokens = sum(len(handle.request.prompt_ids) for handle in slot.current.engine.handles)
        assert found["nightschool_prompt_tokens_total",] == prompt_tokens
        assert found["nightschool_generated_tokens_total",] == 6
        requests = "nightschool_http_requests_total"
        assert found[requests, "method=POST", "path=/generate", "status=200"] == 1
        assert found[requests, "method=POST", "path=/generate", "status=422"] == 1
        assert found[requests, "method=GET", "path=/v1/models/{model}", "status=200"] == 1
        assert found[requests, "method=GET", "path=/v1/models/{model}", "status=404"] == 1
        assert found[requests, "method=GET", "path=other", "status=404"] == 1
        assert found["nightschool_time_to_first_token_seconds_count",] == 1
        assert found["nightschool_http_request_seconds_count", "path=/generate"] == 2
        assert found["nightschool_refreshes_total", "outcome=swapped"] == 1
        assert found["nightschool_version_info", "name=bot", "version=20251202_115436"] == 1
        assert found["nightschool_model_loaded", "name=bot"] == 1
        assert found["nightschool_rows_running",] == 0
        assert found["nightschool_requests_waiting",] == 0


def test_two_apps_do_not_share_metrics():
    with client_of(FakeSlot()) as first, client_of(FakeSlot("other", promoted=None)) as second:
        first.post("/generate", json={"query": "a"})
        assert figures(first)["nightschool_generated_tokens_total",] > 0
        assert figures(second)["nightschool_generated_tokens_total",] == 0
        assert figures(second)["nightschool_model_loaded", "name=other"] == 0


def test_every_request_has_one_line_in_the_log_without_its_prompt():
    with server_log() as log, client_of(FakeSlot(answer=lambda prompt: "a secret answer")) as client:
        first = client.post("/generate", json={"query": "a secret question"})
        client.post(
            "/v1/chat/completions",
            json={"model": "bot", "stream": True, "messages": [{"role": "user", "content": "a secret question"}]},
        )
        client.get("/no/secret/path")
    lines = [row for row in log.rows if row["message"] == "request"]
    assert [(row["path"], row["status"]) for row in lines] == [
        ("/generate", 200),
        ("/v1/chat/completions", 200),
        ("other", 404),
    ]
    assert lines[0]["request_id"] == first.headers["x-request-id"]
    assert lines[0]["version"] == "bot@20251202_115436"
    assert lines[0]["tokens_out"] == lines[1]["tokens_out"] == len("a secret answer")
    assert lines[0]["milliseconds"] > 0
    assert "secret" not in json.dumps(log.rows)


def test_the_start_says_whether_conversations_are_kept():
    with server_log() as log, client_of(FakeSlot()):
        pass
    [started] = [row for row in log.rows if row["message"] == "serving"]
    assert started["recording"] == "conversations are not kept"


def test_an_unexpected_error_is_a_500_with_the_request_id_and_nothing_else():
    slot = FakeSlot()
    with server_log() as log, client_of(slot) as client:
        slot.current.version = None
        answer = client.get("/health")
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] in answer.json()["detail"]
    assert "NoneType" not in answer.text
    assert any("NoneType" in row.get("traceback", "") for row in log.rows)


def test_stopping_closes_the_slot():
    slot = FakeSlot()
    with client_of(slot):
        assert not slot.closed
    assert slot.closed


def test_the_docs_page_needs_no_network():
    with client_of(FakeSlot()) as client:
        page = client.get("/docs")
    assert page.status_code == 200
    assert "POST /generate" in page.text
    assert "src=" not in page.text
    assert "https://" not in page.text
