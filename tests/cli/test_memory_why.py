"""`nightschool memory why`, `ask` and local models that read a memory."""

import json

import pytest

from nightschool.cli.main import main
from nightschool.data.example import Message
from nightschool.engine.local_model import local_model
from nightschool.engine.request import SamplingParams
from tests.support.memory_setups import reader_bot

QUESTION = "Where does Ada live?"


@pytest.fixture(scope="module")
def bot(tmp_path_factory):
    return reader_bot(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def home(bot, monkeypatch):
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(bot.home.path))


@pytest.mark.parametrize(("model", "read"), [("bot", "prompt"), ("reader", "layers"), ("reader", "prompt")])
def test_why_shows_the_answer_and_what_each_token_was_read_from(bot, capsys, model, read):
    way = ["--read", read] if (model, read) == ("reader", "prompt") else []
    words = ["memory", "why", "facts", QUESTION, "--model", model, "--max-new-tokens", "6", *way]
    assert main(["--json", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["memory"]["read"], told["model"].split("@")[0]) == (read, model)
    assert [entry["text"] for entry in told["memory"]["entries"]] == ["Ada lives in Oslo."]
    assert len(told["why"]) == 6
    (entry,) = told["memory"]["entries"]
    if read == "layers":
        assert {share["id"] for token in told["why"] for share in token["entries"]} == {entry["id"]}
    assert all(token["without"] == {entry["id"]: token["without_memory"]} for token in told["why"] if read == "prompt")
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert told["answer"].splitlines()[0] in shown
    assert "WITHOUT IT" in shown


def test_why_names_the_entries_of_the_memory_that_lies_over(bot, capsys):
    bot.remember("mine", "Ada lives in Rome.", "No longer: Bob likes tea.")
    words = [
        "--json",
        "memory",
        "why",
        "facts",
        QUESTION,
        "--overlay",
        "mine",
        "--model",
        "reader",
        "--max-new-tokens",
        "3",
    ]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["id"], one["text"]) for one in told["memory"]["entries"]] == [("mine/m1", "Ada lives in Rome.")]
    assert told["memory"]["revisions"] == {"facts": bot.facts.revision, "mine": 1}
    assert {share["id"] for token in told["why"] for share in token["entries"]} == {"mine/m1"}
    bot.remember("session", "Ada lives in Bern.")
    assert main([*words, "--overlay", "session"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["id"], one["text"]) for one in told["memory"]["entries"]] == [("session/m1", "Ada lives in Bern.")]
    assert list(told["memory"]["revisions"]) == ["session", "mine", "facts"]
    words[4] = "What does Bob like?"
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["entries"] == []


def test_without_an_entry_the_answer_is_the_models_own(capsys):
    words = ["memory", "why", "facts", "Where does Zoe live?", "--model", "reader", "--max-new-tokens", "3"]
    assert main(words) == 0
    assert "has nothing on it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["absent", QUESTION, "--model", "bot"], 4),
        (["facts", QUESTION, "--model", "bot", "--read", "layers"], 2),
        (["facts", QUESTION, "--model", "bot", "--max-new-tokens", "0"], 2),
        (["facts", QUESTION, "--model", "bot", "--overlay", "facts"], 2),
        (["facts", QUESTION, "--model", "bot", "--overlay", "absent"], 4),
        (["facts", QUESTION, "--model", "bot", "--overlay", "mine", "--overlay", "mine"], 2),
    ],
)
def test_what_cannot_be_asked_is_told(words, code):
    assert main(["memory", "why", *words]) == code


def test_a_model_here_reads_its_memory_as_it_would_be_served(bot):
    with local_model(bot.home, "reader") as model:
        asked = [
            model.ask("one", [Message("user", question)], SamplingParams(8, temperature=0)).result(60).text
            for question in (QUESTION, "Where does Zoe live?")
        ]
        assert model.memory.name == "facts"
    assert asked[0] != bot.greedy(QUESTION, 8)
    assert asked[1] == bot.greedy("Where does Zoe live?", 8)
