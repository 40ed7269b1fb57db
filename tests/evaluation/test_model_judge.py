"""A language model may judge in place of the rules; what it changes is said, and without it nobody passes."""

import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from pydantic import ValidationError
from rich.console import Console

from nightschool.config.judge import KEY_VARIABLE, Judge
from nightschool.config.recipe import Gate
from nightschool.evaluation.gate import decide
from nightschool.evaluation.model_judge import judge_sheets
from nightschool.evaluation.report import render
from nightschool.evaluation.scores import ProbeQuestion, ScoreSheet
from nightschool.evaluation.verdict import GateReport


@contextmanager
def served(reply):
    """A server that answers every request with what `reply` makes of its body: a text, or a status and a text."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            said = reply(json.loads(body["messages"][-1]["content"]))
            status, text = said if isinstance(said, tuple) else (200, said)
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            return None

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Judge(url=f"http://127.0.0.1:{server.server_port}/v1/", model="wise"), asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def asked_of(kind, number, expected, **more):
    text = f"Question {number} of kind {kind}?"
    return ProbeQuestion(f"{kind}-{number}", kind, text, expected, [{"role": "user", "content": text}], **more)


def sheets(candidate="The moon is a lamp.", champion="I do not know."):
    new, old = asked_of("new", 0, "Lima", alternatives=("the capital of Peru",)), asked_of("old", 0, "Oslo")
    general = asked_of("general", 0, "Paris")
    return (
        ScoreSheet("bot@2", answers=(new.answered(candidate), old.answered("Oslo."), general.answered("Rome"))),
        ScoreSheet("bot@1", answers=(new.answered(champion), old.answered("Oslo"), general.answered("Rome"))),
    )


def printed(report):
    stream = io.StringIO()
    render(report, Console(file=stream, width=100))
    return stream.getvalue()


def test_what_the_judge_changes_decides_and_is_shown(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with served(lambda one: "Right." if one["answer"].startswith("The moon") else "<think>right?</think> wrong") as (
        judge,
        asked,
    ):
        judged = judge_sheets(judge, *sheets())
    # Only of what the rules could err: neither of the very words nor of what nobody taught.
    assert sorted(body["model"] for _, _, body in asked) == ["wise"] * 2
    assert judged.asked == 2
    assert {(path, key) for path, key, _ in asked} == {("/v1/chat/completions", "Bearer secret")}
    assert json.loads(asked[0][2]["messages"][-1]["content"])["also_right"] == ["the capital of Peru"]
    report = decide(judged.candidate, judged.champion, Gate(), judged=judged)
    assert report.decision == "promote"
    assert [pair.id for pair in report.overruled] == ["new-0"]
    assert decide(*sheets(), Gate()).decision == "refuse"
    text = printed(report)
    assert "was asked about 2 answers and changed 1 verdict: 1 to right, 0 to wrong." in " ".join(text.split())
    assert "Changed by the judge (1)" in text
    assert "(the rules said wrong)" in text
    assert "as right   the capital of Peru" in text
    assert "secret" not in json.dumps(report.to_json())
    assert GateReport.from_json(report.to_json()) == report


def test_an_unclear_reply_leaves_the_verdict_of_the_rules():
    with served(lambda _: "It may be right or wrong.") as (judge, _):
        judged = judge_sheets(judge, *sheets())
    assert (judged.candidate, judged.champion) == sheets()
    assert judged.unclear == 2
    report = decide(judged.candidate, judged.champion, Gate(), judged=judged)
    assert "To 2 it said neither right nor wrong; there the rules' verdict stands." in printed(report)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (lambda _: (500, "right"), "it answered 500"),
        (lambda _: (401, "right"), "it answered 401"),
        (lambda _: (302, "right"), "it answered 302"),
    ],
)
def test_a_judge_that_cannot_be_asked_lets_nobody_through(reply, why):
    good = sheets(candidate="It is Lima.")
    with served(reply) as (judge, asked):
        judged = judge_sheets(judge, *good)
    assert (judged.candidate, judged.champion) == good
    assert {path for path, _, _ in asked} == {"/v1/chat/completions"}
    report = decide(judged.candidate, judged.champion, Gate(), judged=judged)
    assert decide(*good, Gate()).decision == "promote"
    assert report.decision == "refuse"
    assert [rule.rule for rule in report.failed] == ["judge"]
    assert why in report.failed[0].why
    assert "take it out" in report.suggestions[0]
    assert "judge" in printed(report)


def test_a_judge_that_does_not_answer_in_time_lets_nobody_through():
    answered = threading.Event()
    with served(lambda _: answered.wait(10) and "right") as (judge, _):
        judged = judge_sheets(judge.model_copy(update={"timeout": 0.05}), *sheets())
        answered.set()
    assert "could not be asked" in judged.failure


def test_a_judge_that_is_not_there_lets_nobody_through():
    with served(lambda _: "right") as (judge, _):
        pass
    assert "could not be asked" in judge_sheets(judge, *sheets()).failure


@pytest.mark.parametrize(
    "url", ["ftp://judge/v1", "judge:8000/v1", "http://me:secret@judge/v1", "http://judge/v1?key=a"]
)
def test_an_address_is_one_of_a_server_and_holds_no_key(url):
    with pytest.raises(ValidationError, match="address"):
        Judge(url=url, model="wise")
