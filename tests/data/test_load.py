"""A recipe's sources together: duplicates, ids, kept conversations, and what is held out."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.config.recipe import ConversationFilter, DataSource, HeldOut
from nightschool.data.example import Example, Message
from nightschool.data.sources.load import is_held_out, read_file, split_held_out, without_duplicates
from nightschool.errors import DataError, NotFound
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.training_data import load_sources
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.versions import VersionMetadata


def pair(question: str, answer: str, **more: object) -> dict:
    return {"query": question, "retrieved": answer, **more}


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(rows))
    return path


def source(path: str, **more: object) -> DataSource:
    return DataSource.model_validate({"path": path, **more})


def examples(count: int) -> list[Example]:
    return [Example(messages=(Message("user", f"q{i}"), Message("assistant", f"a{i}"))) for i in range(count)]


# --- files ---


def test_sources_come_in_their_order_and_say_what_they_were_read_as(tmp_path: Path) -> None:
    write(tmp_path / "b.json", [pair("1", "x"), {"text": "Once."}])
    (tmp_path / "a.jsonl").write_text('{"question": "2", "answer": "y"}\n')
    loaded = load_sources([source("b.json"), source("*.jsonl")], root=tmp_path)
    assert [example.answer or example.text for example in loaded.examples] == ["x", "Once.", "y"]
    assert [(report.source, report.formats, report.examples) for report in loaded.sources] == [
        ("b.json", {"query_retrieved": 1, "text": 1}, 2),
        ("a.jsonl", {"prompt_completion": 1}, 1),
    ]


def test_exact_duplicates_are_counted_and_keep_their_paraphrases(tmp_path: Path) -> None:
    write(
        tmp_path / "a.json",
        [pair("1", "x", id=1, paraphrases=["one"]), pair("1", "x", id=2, paraphrases=["uno", "one"])],
    )
    write(tmp_path / "b.json", [pair("1", "x")])
    loaded = load_sources([source("a.json"), source("b.json")], root=tmp_path)
    assert loaded.duplicates == 2
    assert [example.paraphrases for example in loaded.examples] == [("one", "uno")]


def test_an_id_that_means_two_things_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [pair("1", "x", id=7), pair("1", "x", id=7), pair("2", "y", id=7)])
    write(tmp_path / "b.json", [pair("3", "z", id=7)])  # files number their rows for themselves
    with pytest.raises(
        DataError, match=r"^a\.json:1: the id '7' is already that of line 1, with another content"
    ) as caught:
        load_sources([source("a.json"), source("b.json")], root=tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_problems_of_all_files_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"query": "1", "retrieved": ""}\nbad\n')
    (tmp_path / "b.json").write_text("")
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(DataError) as caught:
        load_sources([source("a.jsonl"), source("b.json"), source("c.json")], root=tmp_path)
    said = [line.split(": ")[0] for line in str(caught.value).splitlines()]
    assert said == ["a.jsonl:1", "a.jsonl:2", "b.json", "c.json"]


def test_a_missing_file_is_named_by_its_key(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [pair("1", "x")])
    with pytest.raises(NotFound, match=r"^data\.1\.path: there is no file train\.json"):
        load_sources([source("a.json"), source("train.json")], root=tmp_path)
    with pytest.raises(NotFound, match=r"^held_out\.path: there is no file dev\.json"):
        split_held_out([], HeldOut.model_validate({"path": "dev.json"}), root=tmp_path)


def test_a_pinned_format_is_used(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [pair("1", "x") | {"text": "Once."}])
    (example,) = load_sources([source("a.json", format="text")], root=tmp_path).examples
    assert example.text == "Once."


def test_read_file(tmp_path: Path) -> None:
    loaded = read_file(write(tmp_path / "a.json", [pair("1", "x"), pair("1", "x")]))
    assert (len(loaded.examples), loaded.duplicates) == (1, 1)


# --- held out ---


def test_the_share_is_chosen_by_digest_and_stays_when_data_grows() -> None:
    few = split_held_out(examples(400), HeldOut.model_validate({"share": "10%"}))
    many = split_held_out(examples(800), HeldOut.model_validate({"share": "10%"}))
    assert 20 <= len(few.held_out) <= 60
    assert {e.digest for e in few.held_out} <= {e.digest for e in many.held_out}
    assert {e.digest for e in few.train} <= {e.digest for e in many.train}
    assert len(many.train) + len(many.held_out) == 800


def test_corrections_are_never_held_out_by_share() -> None:
    corrections = [replace(example, source="conversations", line=0) for example in examples(400)[::2]]
    split = split_held_out([*examples(400)[1::2], *corrections], HeldOut(share=0.5, min_examples=10))
    assert set(corrections) <= set(split.train)
    assert 60 < len(split.held_out) < 140  # of the others


def test_a_correction_that_a_file_says_too_is_still_a_correction() -> None:
    (said,) = examples(1)
    corrected = replace(said, source="conversations", line=0, id="r1")
    for order in ([said, corrected], [corrected, said]):
        (kept,), duplicates = without_duplicates(order)
        assert (kept.source, kept.id, duplicates) == ("conversations", "r1", 1)


def test_with_few_examples_nothing_is_held_out() -> None:
    assert split_held_out(examples(99), HeldOut()).held_out == []
    assert split_held_out(examples(99), HeldOut(min_examples=99, share=0.5)).held_out


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1), min_size=1, unique=True))
def test_shares_of_0_and_1_are_none_and_all(texts: list[str]) -> None:
    assert not any(is_held_out(Example(text=text), 0.0) for text in texts)
    assert all(is_held_out(Example(text=text), 1.0) for text in texts)


def test_what_a_file_holds_out_is_never_trained(tmp_path: Path) -> None:
    write(tmp_path / "dev.json", [pair("q1", "a1"), pair("q9", "a9")])
    train, held_out = split_held_out(examples(3), HeldOut.model_validate({"path": "dev.json"}), root=tmp_path)
    assert [example.question for example in train] == ["q0", "q2"]
    assert [example.question for example in held_out] == ["q1", "q9"]


# --- kept conversations ---


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.ensure()
    return home


def keep(
    home: Home,
    request_id: str,
    question: str,
    answer: str,
    *,
    rating: str | None = None,
    correction: str | None = None,
    minutes: int = 0,
    before: list[dict] | None = None,
) -> None:
    with Database(home).connect() as database:
        store = ConversationStore(database)
        time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
        store.record(
            request_id,
            "bot",
            "bot@20260101_000000",
            [*(before or []), {"role": "user", "content": question}],
            answer,
            time=time,
        )
        if rating or correction:
            store.feedback(request_id, rating, correction)


def kept(**more: object) -> DataSource:
    return DataSource.model_validate({"from": "conversations", **more})


def test_a_correction_becomes_the_answer_and_earlier_answers_are_context(home: Home, tmp_path: Path) -> None:
    keep(home, "r1", "And Peter?", "Oslo", rating="bad", correction="Peter lives in Lima.", before=[
        {"role": "user", "content": "Where does Anna live?"}, {"role": "assistant", "content": "Rome"},
    ])  # fmt: skip
    keep(home, "r2", "Hello?", "Hi.")
    loaded = load_sources([kept()], root=tmp_path, home=home)
    (example,) = loaded.examples
    assert [(m.role, m.content, m.weight) for m in example.messages] == [
        ("user", "Where does Anna live?", 1.0),
        ("assistant", "Rome", 0.0),
        ("user", "And Peter?", 1.0),
        ("assistant", "Peter lives in Lima.", 1.0),
    ]
    assert (example.source, example.id) == ("conversations", "r1")
    assert loaded.sources[0].examples == 1


def test_a_recipe_studies_the_conversations_of_its_own_name_unless_it_names_others(home: Home, tmp_path: Path) -> None:
    for request_id, name in (("r1", "bot"), ("r2", "other")):
        with Database(home).connect() as database:
            store = ConversationStore(database)
            turns = [{"role": "user", "content": f"Who are you, {name}?"}]
            store.record(request_id, name, "20260101_000000", turns, "?")
            store.feedback(request_id, None, f"I am {name}.")

    def studied(**where: object) -> list[str]:
        source = kept(where={"corrected": True} | where)
        loaded = load_sources([source], root=tmp_path, home=home, name="bot")
        return [example.answer for example in loaded.examples]

    assert studied() == ["I am bot."]
    assert studied(model="other") == ["I am other."]
    assert studied(model="any") == ["I am bot.", "I am other."]


def test_good_answers_can_be_studied_and_bad_ones_never_are(home: Home, tmp_path: Path) -> None:
    keep(home, "r1", "1", "good", rating="good")
    keep(home, "r2", "2", "bad", rating="bad")
    keep(home, "r3", "3", "unrated")
    where = ConversationFilter(rating="any")
    loaded = load_sources([kept(where=where.model_dump())], root=tmp_path, home=home)
    assert [example.answer for example in loaded.examples] == ["good", "unrated"]
    assert loaded.bad == 1
    only = load_sources([kept(where={"rating": "good"})], root=tmp_path, home=home)
    assert [example.answer for example in only.examples] == ["good"]


def test_the_latest_correction_of_a_question_counts(home: Home, tmp_path: Path) -> None:
    keep(home, "r1", "Where?", "x", correction="Rome", minutes=5)
    keep(home, "r2", "Where?", "x", correction="Oslo", minutes=9)
    keep(home, "r3", "Where?", "x", correction="Lima", minutes=1)
    loaded = load_sources([kept()], root=tmp_path, home=home)
    assert [example.answer for example in loaded.examples] == ["Oslo"]
    assert loaded.superseded == 2


def test_a_conversation_that_cannot_be_studied_is_named(home: Home, tmp_path: Path) -> None:
    keep(home, "r1", " ", "x", correction="y")
    with pytest.raises(DataError, match=r"^conversations: r1: 'messages\[0\]\.content' is blank"):
        load_sources([kept()], root=tmp_path, home=home)


def test_since_the_last_promotion_means_since_its_run_began(home: Home, tmp_path: Path) -> None:
    """What was said while the champion was being trained, before it was promoted, is still new."""
    for minutes in (0, 30, 90):
        keep(home, f"r{minutes}", f"q{minutes}", "x", correction="y", minutes=minutes)
    with Database(home).connect() as database:  # the corrections came with the conversations
        import sqlalchemy as sa

        with database.write() as connection:
            connection.execute(
                sa.text(
                    "update feedback set recorded_at = (select recorded_at from conversations c where c.request_id = feedback.request_id)"
                )
            )
    sources = [kept(since="last_promoted")]
    assert len(load_sources(sources, root=tmp_path, home=home, name="bot").examples) == 3
    registry = Registry(home)
    version = registry.publish(
        "bot", lambda folder: (folder / "x.txt").write_text("x"), VersionMetadata(run_id="bot-20260101_002000")
    )
    registry.promote("bot", version.id, by="test")
    loaded = load_sources(sources, root=tmp_path, home=home, name="bot")
    assert [example.question for example in loaded.examples] == ["q30", "q90"]
