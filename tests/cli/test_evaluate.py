"""`nightschool eval`: what is right, what is wrong, and what could not be asked."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from nightschool.cli.main import main
from nightschool.engine.request import Generated, Usage
from nightschool.errors import PromptTooLong

CONTEXT_TOKENS = 8


class FakeModel:
    """Says `yes` to all; its prompts have as many tokens as words, and a question with `broken` fails."""

    ref = "bot@20261121_060000"
    loaded = SimpleNamespace(tokenizer=None, context_tokens=CONTEXT_TOKENS, model=None)

    def __init__(self):
        self.asked = []

    def ask(self, request_id, messages, params):
        words = len(messages[-1].content.split())
        if words + params.max_new_tokens > CONTEXT_TOKENS:
            raise PromptTooLong(words, params.max_new_tokens, CONTEXT_TOKENS)
        self.asked.append((messages[-1].content, params.max_new_tokens))
        failed = "broken" in messages[-1].content
        text, reason, error = ("", "error", "nan") if failed else ("yes", "stop", None)
        generated = Generated(text, (), reason, Usage(words, 1), self.ref, error=error)
        return SimpleNamespace(result=lambda: generated)


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    model = FakeModel()

    @contextmanager
    def local_model(home, ref, *, num_rows):
        yield model

    monkeypatch.setattr("nightschool.cli.local_model.local_model", local_model)
    monkeypatch.setattr("nightschool.cli.evaluate._loss", lambda *_: (None, 0))

    def run(*rows, words=("--json",)):
        (tmp_path / "q.json").write_text(json.dumps([{"query": q, "retrieved": a} for q, a in rows]))
        code = main(["eval", "./folder", "--suite", "q.json", "--max-new-tokens", "4", *words])
        return code, capsys.readouterr(), model.asked

    return run


def test_questions_that_do_not_fit_are_listed_and_not_counted(ask):
    rows = [
        ("is it so?", "yes"),
        ("is it not so?", "no"),
        ("one two three four five six", "yes"),
        ("word " * 20, "yes"),
    ]
    code, output, asked = ask(*rows)
    data = json.loads(output.out)
    assert code == 0
    assert data["questions"] == {"new": {"asked": 3, "correct": 2}}
    assert data["accuracy"] == pytest.approx(2 / 3)
    (one,) = data["not_asked"]
    assert (one["tokens"], one["context_tokens"]) == (20, CONTEXT_TOKENS)
    # Where the context is nearly full, the answer has the room that is left.
    assert ("one two three four five six", 2) in asked
    _, output, _ = ask(*rows, words=())
    assert "not asked  1, too long for the model's context" in output.out
    assert "20 of 8 tokens  word word" in output.out


def test_an_answer_that_could_not_be_generated_is_no_wrong_answer_but_an_error(ask):
    code, output, _ = ask(("is it so?", "yes"), ("this is broken", "yes"))
    assert code == 1
    assert "failed at the question 'this is broken': nan" in json.loads(output.out)["error"]["message"]
