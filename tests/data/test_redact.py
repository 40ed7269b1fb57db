"""Personal data in examples: replaced before anything else sees it, and nothing asked of a network."""

from __future__ import annotations

import builtins
import json
import socket
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.cli.main import main
from nightschool.config.recipe import DataSource, PersonalData, Recipe
from nightschool.data.example import Example, Message
from nightschool.errors import UsageError
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.selection import select_examples
from nightschool.feedback.training_data import load_sources
from nightschool.store.home import Home

ALL: list[PersonalData] = ["key", "email", "card", "iban", "ip", "phone"]


@pytest.fixture(scope="module")
def redactor():
    pytest.importorskip("presidio_analyzer")
    from nightschool.data.redact import Redactor

    return Redactor(ALL)


def clean(redactor, text):
    found = Counter()
    return redactor.redact(Example(text=text), found).text, dict(found)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ada@example.org", "email"),
        ("ada.lovelace+x@mail.corp.internal", "email"),
        ("+44 20 7946 0958", "phone"),
        ("(212) 555-0123", "phone"),
        ("4111 1111 1111 1111", "card"),
        ("DE89 3704 0044 0532 0130 00", "iban"),
        ("10.1.2.3", "ip"),
        ("sk-proj-abcdefghijklmnop0123456789", "key"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "key"),
        ("AKIAIOSFODNN7EXAMPLE", "key"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlLW9mLWl0", "key"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA PRIVATE KEY-----", "key"),
    ],
)
def test_each_kind_is_found_inside_of_a_sentence(redactor, text, kind):
    assert clean(redactor, f"Take {text} for now.") == (f"Take [{kind.upper()}] for now.", {kind: 1})


@pytest.mark.parametrize(
    "text", ["See you on 2026-11-26 at 12:30.", "Order 12345, 3 kg for 4.50", "def key(x): ...", ""]
)
def test_what_is_not_personal_stays(redactor, text):
    assert clean(redactor, text) == (text, {})


def test_several_in_one_text_and_what_lies_between_them_stays(redactor):
    text, found = clean(redactor, "a@b.org, c@d.org; 4111 1111 1111 1111 (ask a@b.org)")
    assert text == "[EMAIL], [EMAIL]; [CARD] (ask [EMAIL])"
    assert found == {"email": 3, "card": 1}


def test_every_part_of_an_example_is_looked_at_and_its_id_stays(redactor):
    example = Example(
        messages=(Message("system", "s@x.org"), Message("user", "u@x.org"), Message("assistant", "a@x.org", 0.5)),
        paraphrases=("p@x.org",),
        corrects="c@x.org",
        id="row@x.org",
        repeat=3,
    )
    redacted = redactor.redact(example, Counter())
    assert "@" not in json.dumps(redacted.to_json() | {"id": ""})
    assert (redacted.id, redacted.repeat, redacted.messages[2].weight) == ("row@x.org", 3, 0.5)


@given(st.text(alphabet="a1@. -+()4[]\n", max_size=80))
def test_redacting_twice_changes_nothing_more(redactor, text):
    once, _ = clean(redactor, text)
    assert clean(redactor, once) == (once, {})


def test_nothing_is_asked_of_a_network(redactor, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    assert clean(redactor, "a@never.seen.example")[1] == {"email": 1}


def source(tmp_path, **more):
    rows = [{"messages": [{"role": "user", "content": "Mail a@b.org?"}, {"role": "assistant", "content": "Yes."}]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataSource.model_validate({"path": "d.jsonl", **more})


def test_a_source_is_redacted_as_it_asks_and_says_how_much(redactor, tmp_path):
    plain = load_sources([source(tmp_path)], root=tmp_path)
    loaded = load_sources([source(tmp_path, redact=["email"])], root=tmp_path)
    assert plain.examples[0].question == "Mail a@b.org?"
    assert loaded.examples[0].question == "Mail [EMAIL]?"
    assert (plain.sources[0].redacted, loaded.sources[0].redacted) == ({}, {"email": 1})


def test_kept_conversations_are_redacted_before_they_are_selected(redactor, tmp_path):
    home = Home(tmp_path / "home").ensure()
    conversations = ConversationStore(home.database)
    conversations.record("r1", "bot", "20260101_000000", [{"role": "user", "content": "Who is a@b.org?"}], "Nobody.")
    conversations.feedback("r1", correction="Ada, of a@b.org.")
    recipe = {"name": "bot", "base": "new:tiny", "data": [{"from": "conversations", "redact": ["email"]}]}
    selection = select_examples(Recipe.model_validate(recipe), home, tmp_path)
    assert [(one.question, one.answer) for one in selection.train] == [("Who is [EMAIL]?", "Ada, of [EMAIL].")]


def test_the_check_on_the_command_line_says_how_much_was_replaced(redactor, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source(tmp_path)
    (tmp_path / "r.yaml").write_text("base: new:tiny\ndata: [{path: d.jsonl, redact: [email, phone]}]\n")
    assert main(["data", "check", "r.yaml"]) == 0
    assert "1 x email replaced" in capsys.readouterr().out


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    whole = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("presidio"):
            raise ModuleNotFoundError("No module named 'presidio_analyzer'")
        return whole(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'nightschool\[redact\]'"):
        load_sources([source(tmp_path, redact=["email"])], root=tmp_path)
