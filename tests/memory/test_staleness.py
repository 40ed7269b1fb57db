"""Which versions learned what a memory no longer says."""

import json

import pytest

from nightschool.data.example import Example, Message
from nightschool.errors import NotFound
from nightschool.feedback.erasure import taints_of
from nightschool.memory.entry import NewEntry
from nightschool.memory.staleness import (
    StaleVersions,
    Statement,
    ended_statements,
    purge,
    stale_versions,
    versions_that_learned_entries,
    versions_that_learned_purged,
)
from nightschool.memory.store import MemoryStore
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from tests.support.cli_home import add_version, make_run


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def store(home):
    with MemoryStore.create(memory_path(home, "acme/facts")) as made:
        yield made


def say(store, *sentences):
    store.add([NewEntry(one) for one in sentences], author="ada")


def talk(question, answer, weight=1):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "weight": weight}]
    }


def trained(home, name, *rows, file="new_examples.jsonl", **facts):
    run = make_run(home, name=name, minutes=trained.count)
    trained.count += 1
    (run.path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return add_version(home, name=name, run_id=run.id, **facts)


trained.count = 0


def stale(home, store):
    return {one.entry.text: set(one.versions) for one in stale_versions(home, "acme/facts", store)}


def test_versions_that_learned_an_old_value_and_those_that_grew_from_them_are_stale(home, store):
    learned = trained(home, "acme/bot", talk("Where does Ada live?", "She lives in Oslo."))
    child = add_version(home, name="acme/bot", parent=learned.ref)
    trained(home, "acme/bot", talk("Where does Bob live?", "He lives in Oslo."))
    trained(home, "acme/bot", talk("Does Ada live in Oslo?", "Ask her."))
    trained(home, "acme/bot", talk("Where does Ada live?", "In Oslo."), file="heldout.jsonl")
    trained(home, "other", talk("Where does Ada live?", "In Oslo."))
    say(store, "Ada lives in Oslo.")
    assert stale(home, store) == {}
    say(store, "Ada lives in Rome.")
    assert stale(home, store) == {"Ada lives in Oslo.": {learned.ref, child.ref}}


def test_a_value_that_comes_back_makes_nobody_stale_and_the_one_between_does(home, store):
    oslo = trained(home, "acme/bot", talk("Where does Ada live?", "In Oslo."))
    rome = trained(home, "acme/bot", talk("Where does Ada live?", "In Rome."))
    for value in ("Oslo", "Rome", "Oslo"):
        say(store, f"Ada lives in {value}.")
    assert stale(home, store) == {"Ada lives in Rome.": {rome.ref}}
    store.remove("m1", author="ada")
    assert stale(home, store) == {"Ada lives in Rome.": {rome.ref}, "Ada lives in Oslo.": {oslo.ref}}


def test_before_a_purge_it_can_be_told_who_learned_anything_that_an_entry_ever_said(home, store):
    oslo = trained(home, "acme/bot", talk("Where does Ada live?", "In Oslo."))
    rome = trained(home, "acme/bot", talk("Where does Ada live?", "In Rome."))
    trained(home, "acme/bot", talk("Where does Bob live?", "In Rome."))
    say(store, "Ada lives in Oslo.", "Kim lives in Bern.")
    say(store, "Ada lives in Rome.")

    def learned(*entries):
        return {
            one.entry: set(one.versions) for one in versions_that_learned_entries(home, "acme/facts", store, entries)
        }

    assert learned("m1", "m2", "m77") == {"m1": {oslo.ref, rome.ref}}
    store.purge("m1", author="ada")
    assert learned("m1") == {}


def test_a_purge_marks_who_learned_the_entry_for_good_and_keeps_nothing_of_it(home, store):
    learned = trained(home, "acme/bot", talk("Where does Ada live?", "In Oslo."))
    child = add_version(home, name="acme/bot", parent=learned.ref)
    say(store, "Ada lives in Oslo.", "Bob lives in Bern.")
    done, told = purge(home, "acme/facts", store, ["m1"], author="ada")
    assert (done.entries, [set(one.versions) for one in told]) == (("m1",), [{learned.ref, child.ref}])
    assert taints_of(home.database, "acme/bot") == {
        version.partition("@")[2]: ["facts/m1"] for version in (learned.ref, child.ref)
    }
    assert [one.to_json() for one in versions_that_learned_purged(home, "acme/facts", store)] == [
        {"id": "m1", "text": None, "ended": None, "versions": sorted([learned.ref, child.ref])}
    ]
    with pytest.raises(NotFound, match="There is no entry m9"):
        purge(home, "acme/facts", store, ["m2", "m9"], author="ada")
    assert store.get("m2").value == "Bern"
    with MemoryStore.create(memory_path(home, "acme/other")) as other:
        assert versions_that_learned_purged(home, "acme/other", other) == []


def test_a_sentence_without_a_subject_is_looked_for_as_a_whole(home, store):
    learned = trained(home, "acme/bot", talk("What is new?", "Well: the old mill is closed, they say!"))
    say(store, "The old mill is closed, they say.", "The new mill is open, they say.")
    store.remove("m1", "m2", author="ada")
    assert stale(home, store) == {"The old mill is closed, they say.": {learned.ref}}


def by_version(known, tenant="acme"):
    return {ref: [(one.memory, one.entry.text) for one in facts] for ref, facts in known.of(tenant).items()}


def test_each_version_is_told_with_what_it_learned_of_any_memory_of_its_tenant(home, store):
    known = StaleVersions(home)
    learned = trained(
        home, "acme/bot", talk("Where does Ada live?", "In Oslo."), talk("Who has a dog?", "Rex is a dog.")
    )
    say(store, "Ada lives in Oslo.")
    assert by_version(known) == {}
    say(store, "Ada lives in Rome.")
    assert by_version(known) == {learned.ref: [("acme/facts", "Ada lives in Oslo.")]}
    later = trained(home, "acme/bot", talk("Where does Ada live?", "In Oslo."))
    assert set(by_version(known)) == {learned.ref, later.ref}
    with MemoryStore.create(memory_path(home, "acme/pets")) as pets:
        pets.add([NewEntry("Rex is a dog.")], author="ada")
        pets.remove("m1", author="ada")
    assert by_version(known)[learned.ref] == [("acme/facts", "Ada lives in Oslo."), ("acme/pets", "Rex is a dog.")]
    say(store, "Ada lives in Oslo.")
    assert by_version(known) == {learned.ref: [("acme/pets", "Rex is a dog.")]}
    assert by_version(known, "other") == {}


def test_a_memory_that_cannot_be_read_is_left_out_of_what_is_stale(home, store, caplog):
    learned = trained(home, "acme/bot", talk("Where does Ada live?", "In Oslo."))
    say(store, "Ada lives in Oslo.")
    say(store, "Ada lives in Rome.")
    broken = memory_path(home, "acme/broken")
    broken.mkdir()
    (broken / "memory.db").write_bytes(b"no database" * 200)
    assert list(by_version(StaleVersions(home))) == [learned.ref]
    assert "acme/broken" in caplog.text


def test_only_what_ended_since_is_looked_at(store):
    say(store, "Ada lives in Oslo.", "Bob lives in Oslo.")
    store.remove("m1", author="ada")
    before = store.revision
    store.remove("m2", author="ada")
    assert [one.id for one in ended_statements(store, since=before)] == ["m2"]
    store.purge("m1", author="ada")
    assert [one.id for one in ended_statements(store)] == ["m2"]


@pytest.mark.parametrize(
    ("example", "is_learned"),
    [
        (Example(text="ADA has lived in Oslo ever since."), True),
        (Example(text="Adam has lived in Oslo."), False),
        (Example(messages=(Message("user", "Ada?"), Message("assistant", "Oslo-born"))), True),
        (Example(messages=(Message("user", "Ada?"), Message("assistant", "Oslo", 0.0))), False),
        (Example(messages=(Message("user", "Ada?"), Message("assistant", "Rome")), rejected="Oslo"), False),
    ],
)
def test_an_example_teaches_what_its_answers_say(store, example, is_learned):
    say(store, "Ada lives in Oslo.")
    assert Statement(store.get("m1")).is_in(example) == is_learned
