"""What the state database keeps: conversations, accepted examples, pins, the ledger."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import pytest

from nightschool.data.example import Example, Message
from nightschool.errors import Conflict, Locked, NameRefused, NotFound, UsageError
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.pins import Pins
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.store.ledger import Ledger
from tests.support.store_databases import db, environment, postgres, postgres_url  # noqa: F401

T0 = datetime(2026, 11, 21, 2, 30, tzinfo=UTC)
ASKED = [{"role": "user", "content": "Who runs it?"}]


def hours(count):
    return T0 + timedelta(hours=count)


def qa(question, answer="a", **more):
    return Example(messages=(Message("user", question), Message("assistant", answer)), **more).to_json()


# conversations


@pytest.fixture
def kept(db):  # noqa: F811
    store = ConversationStore(db)
    for index, (model, owner) in enumerate([("bot", None), ("acme/bot", "key"), ("zoo", None)]):
        store.record(f"r{index}", model, f"{model}@20261121_023000", ASKED, f"answer {index}", owner, time=hours(index))
    return store


def ids(conversations):
    return [conversation.request_id for conversation in conversations]


def test_a_conversation_comes_back_as_it_was(kept):
    conversation = kept.get("r1")
    assert (conversation.request_id, conversation.time, conversation.model) == ("r1", hours(1), "acme/bot")
    assert (conversation.version, conversation.messages, conversation.answer) == (
        "acme/bot@20261121_023000",
        ASKED,
        "answer 1",
    )
    assert (conversation.rating, conversation.correction, conversation.owner) == (None, None, "key")
    with pytest.raises(NotFound, match="'r9' was recorded"):
        kept.get("r9")
    with pytest.raises(Conflict, match="'r1' was recorded before"):
        kept.record("r1", "bot", "v", ASKED, "x")
    assert kept.get("r1").answer == "answer 1"


@pytest.mark.parametrize("text", ["", "\0", "\ud800", "🦉" * 1000, "'; DROP TABLE conversations; --"])
def test_any_text_survives(db, text):  # noqa: F811
    store = ConversationStore(db)
    store.record("r", "bot", "v", [{"role": "user", "content": text}], text)
    store.feedback("r", correction=text + "x")
    conversation = store.get("r")
    assert (conversation.messages[0]["content"], conversation.answer, conversation.correction) == (
        text,
        text,
        text + "x",
    )


def test_the_newest_feedback_wins_for_each(kept):
    kept.feedback("r0", "bad", "first")
    kept.feedback("r0", correction="second")
    kept.feedback("r0", "good")
    assert (kept.get("r0").rating, kept.get("r0").correction) == ("good", "second")


def test_feedback_that_says_nothing_or_names_nobody(kept):
    with pytest.raises(NotFound, match=r"serve\.record_conversations"):
        kept.feedback("r9", "good")
    for rating, correction in ((None, None), ("great", None), ("bad", "  \n")):
        with pytest.raises(UsageError):
            kept.feedback("r0", rating, correction)
    assert kept.get("r0").rating is None


def test_filters(kept):
    kept.feedback("r0", "good", time=hours(5))
    kept.feedback("r1", "bad", "right", time=hours(6))
    assert ids(kept.select()) == ids(kept.select("any")) == ["r0", "r1", "r2"]
    assert ids(kept.select(rating="good")) == ["r0"]
    assert ids(kept.select(rating="bad")) == ["r1"]
    assert ids(kept.select(corrected=True)) == ["r1"]
    assert ids(kept.select(corrected=False)) == ["r0", "r2"]
    assert ids(kept.select(model="zoo")) == ["r2"]
    assert ids(kept.select(model="bot")) == ["r0"]
    assert ids(kept.select(model="acme/bot")) == ids(kept.select(tenant="acme")) == ["r1"]
    assert ids(kept.select(tenant="default")) == ["r0", "r2"]
    assert ids(kept.select(since=hours(2))) == ["r0", "r1", "r2"]  # old answers with later feedback are new
    assert ids(kept.select(since=hours(5.5))) == ["r1"]
    assert ids(kept.select(rating="good", corrected=True)) == []
    assert kept.get("r1").touched_at == hours(6)
    with pytest.raises(UsageError, match="good, bad or any"):
        kept.select(rating="fine")


def test_a_moment_in_another_time_zone_is_the_same_moment(kept):
    east = timezone(timedelta(hours=9))
    kept.record("r3", "bot", "v", ASKED, "x", time=hours(3).astimezone(east))
    assert kept.get("r3").time == hours(3)
    assert ids(kept.select(since=hours(3).astimezone(east))) == ["r3"]


def test_to_forget_takes_everything_that_was_made_of_it(kept, db):  # noqa: F811
    accepted = AcceptedExamples(db)
    kept.feedback("r0", "bad", "right")
    accepted.add("bot", "v1", [qa("a", id="r0", source="conversations"), qa("b", id="r0", source="file.json", line=1)])
    accepted.add("bot", "v2", [qa("a", id="r0", source="conversations")])
    assert kept.forget("r0") == 2
    assert [row["source"] for row in accepted.shuffled("bot", 0)] == ["file.json"]
    with pytest.raises(NotFound):
        kept.forget("r0")


def test_what_was_forgotten_does_not_come_back(kept, db):  # noqa: F811
    accepted = AcceptedExamples(db)
    example = qa("a", id="r0", source="conversations")
    kept.forget("r0")
    assert accepted.add("bot", "v1", [example, qa("b")]) == 1  # as from the files of an old run
    assert pool_of(accepted) == sorted([qa("b")], key=str)
    with pytest.raises(Conflict, match="'r0' was forgotten"):
        kept.record("r0", "bot", "v", ASKED, "again")


def test_many_record_at_once(db):  # noqa: F811
    store = ConversationStore(db)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: store.record(f"r{index}", "bot", "v", ASKED, str(index)), range(60)))
    assert len(store.select()) == 60


# accepted examples


def pool_of(accepted, name="bot"):
    return sorted(accepted.shuffled(name, 0), key=str)


def test_the_pool_holds_each_example_once(db):  # noqa: F811
    accepted = AcceptedExamples(db)
    assert accepted.add("bot", "v1", [qa("a"), qa("b"), qa("a", id="again")]) == 2
    assert accepted.add("bot", "v1", [qa("b")]) == 0
    assert accepted.add("bot", "v2", [qa("b", id="later"), qa("c")]) == 2
    accepted.add("zoo", "v1", [qa("z")])
    assert pool_of(accepted) == sorted([qa("a"), qa("b"), qa("c")], key=str)
    assert len(accepted.digests("bot")) == 3
    assert accepted.digests("bot") == {Example.from_json(qa(question)).digest for question in "abc"}
    assert accepted.shuffled("nobody", 0) == []


def test_what_a_rolled_back_version_learned_leaves_and_returns(db):  # noqa: F811
    accepted = AcceptedExamples(db)
    accepted.add("bot", "v1", [qa("a"), qa("b")])
    accepted.add("bot", "v2", [qa("b"), qa("c")])
    accepted.drop_version("bot", "v2")
    assert pool_of(accepted) == sorted([qa("a"), qa("b")], key=str)
    accepted.drop_version("bot", "v1")
    assert len(accepted.digests("bot")) == 0
    accepted.restore_version("bot", "v2")  # promoted again, alone
    assert pool_of(accepted) == sorted([qa("b"), qa("c")], key=str)
    accepted.drop_version("bot", "v9")  # a version that learned nothing
    accepted.restore_version("bot", "v9")
    assert len(accepted.digests("bot")) == 2


def answered(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_a_newer_answer_replaces_the_older_one_while_its_version_is_in(db):  # noqa: F811
    accepted = AcceptedExamples(db)
    oslo, bergen, sea = answered("Capital?", "Oslo"), answered("Capital?", "Bergen"), answered("Sea?", "North")
    accepted.add("bot", "v1", [oslo, sea])
    accepted.add("bot", "v2", [bergen])
    assert pool_of(accepted) == sorted([sea, bergen], key=str)
    assert (len(accepted.digests("bot")), len(accepted.trained("bot"))) == (2, 3)
    assert oslo not in accepted.shuffled("bot", 1)[:9]
    accepted.drop_version("bot", "v2")
    assert pool_of(accepted) == sorted([oslo, sea], key=str)
    accepted.restore_version("bot", "v2")
    assert pool_of(accepted) == sorted([sea, bergen], key=str)
    accepted.add("bot", "v3", [oslo])  # corrected back
    assert pool_of(accepted) == sorted([oslo, sea], key=str)


def test_answers_of_one_version_to_one_question_all_stay(db):  # noqa: F811
    accepted = AcceptedExamples(db)
    accepted.add("bot", "v1", [answered("A joke?", "One"), answered("A joke?", "Two")])
    assert len(accepted.digests("bot")) == 2


def test_a_sample_depends_on_pool_and_seed_alone(db):  # noqa: F811
    accepted = AcceptedExamples(db)
    accepted.add("bot", "v1", [qa(str(index)) for index in range(50)])
    sample = accepted.shuffled("bot", 1)[:10]
    assert sample == accepted.shuffled("bot", 1)[:10]
    assert sample != accepted.shuffled("bot", 2)[:10]
    assert len({Example.from_json(example).digest for example in sample}) == 10
    assert len(accepted.shuffled("bot", 1)) == 50
    accepted.add("bot", "v2", [qa("new")])
    assert len([example for example in accepted.shuffled("bot", 1)[:10] if example in sample]) >= 9


# pins


def test_pins(db):  # noqa: F811
    pins = Pins(db)
    first = pins.add("bot", "Who?", "Ann")
    second = pins.add("bot", "Where?", "Here")
    pins.add("zoo", "Who?", "Bob")
    assert pins.ls("bot") == [first, second]
    with pytest.raises(Conflict, match=rf"pinned 'Who\?' already, to 'Ann' \(pin {first.id}\)"):
        pins.add("bot", "Who?", "Bob")
    with pytest.raises(NotFound, match=rf"no pin {first.id}"):
        pins.remove("zoo", first.id)
    pins.remove("bot", first.id)
    assert pins.ls("bot") == [second]
    with pytest.raises(NotFound, match=rf"It has {second.id}"):
        pins.remove("bot", first.id)
    for question, answer in (("", "a"), ("q", " ")):
        with pytest.raises(UsageError, match="blank"):
            pins.add("bot", question, answer)
    with pytest.raises(NameRefused):
        pins.add("../bot", "q", "a")


# the ledger


def test_a_cycle_from_begin_to_finish(db):  # noqa: F811
    ledger = Ledger(db)
    assert ledger.last("bot") is None
    cycle_id = ledger.begin("bot", T0, "schedule")
    (cycle,) = ledger.ls("bot")
    assert (cycle.id, cycle.due_at, cycle.trigger, cycle.outcome) == (cycle_id, T0, "schedule", None)
    done = ledger.finish(cycle_id, "promoted", "all good", "bot-x", "bot@v", "f00")
    assert done == ledger.last("bot")
    assert (done.outcome, done.detail, done.run_id, done.candidate, done.data_fingerprint) == (
        "promoted",
        "all good",
        "bot-x",
        "bot@v",
        "f00",
    )
    assert done.finished_at >= done.started_at
    assert ledger.ls("bot") == [done]


def test_a_cycle_is_begun_once_and_finished_once(db):  # noqa: F811
    ledger = Ledger(db)
    cycle_id = ledger.begin("bot", T0, "schedule")
    east = T0.astimezone(timezone(timedelta(hours=9)))
    with pytest.raises(Locked, match=r"was begun by process .+:\d+:[\d.]+ at"):
        ledger.begin("bot", east, "manual")
    ledger.begin("zoo", T0, "schedule")
    ledger.finish(cycle_id, "skipped")
    with pytest.raises(Conflict, match=r"done already \(skipped\)"):
        ledger.begin("bot", T0, "schedule")
    with pytest.raises(Conflict, match=r"finished already \(skipped\), so it cannot be failed"):
        ledger.finish(cycle_id, "failed")
    with pytest.raises(NotFound, match="no cycle 999"):
        ledger.finish(999, "failed")
    with pytest.raises(UsageError, match=r"promoted, .*refused"):
        ledger.finish(cycle_id, "won")


def test_of_many_schedulers_one_begins(db):  # noqa: F811
    ledger = Ledger(db)

    def begin(_):
        try:
            return ledger.begin("bot", T0, "schedule")
        except Locked:
            return None

    with ThreadPoolExecutor(8) as pool:
        begun = [cycle_id for cycle_id in pool.map(begin, range(16)) if cycle_id is not None]
    assert len(begun) == 1


def test_the_ledger_is_listed_by_due_time(db):  # noqa: F811
    ledger = Ledger(db)
    for index in (1, 3, 2):
        ledger.finish(ledger.begin("bot", hours(index), "schedule"), "skipped")
    assert [cycle.due_at for cycle in ledger.ls("bot")] == [hours(3), hours(2), hours(1)]
    assert [cycle.due_at for cycle in ledger.ls("bot", limit=2)] == [hours(3), hours(2)]
    assert ledger.last("bot").due_at == hours(3)


def test_pausing(db):  # noqa: F811
    ledger = Ledger(db)
    assert not ledger.paused("bot")
    ledger.pause("bot")
    since = ledger.paused_at("bot")
    ledger.pause("bot")
    assert ledger.paused("bot")
    assert ledger.paused_at("bot") == since
    assert not ledger.paused("zoo")
    ledger.resume("bot")
    ledger.resume("bot")
    assert not ledger.paused("bot")
