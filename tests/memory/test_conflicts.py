"""Relations with one value or several, entries that may contradict each other, and what people decide."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.errors import NotFound, UsageError
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore


@pytest.fixture
def store(tmp_path):
    with MemoryStore.create(tmp_path / "facts") as made:
        yield made


def say(store, *sentences):
    return store.add([NewEntry(one) for one in sentences], author="ada")


def texts(store):
    return [one.text for one in store.entries()]


def pairs(store):
    return [(one.kind, one.a.id, one.b.id) for one in store.conflicts()]


def two_homes(store):
    store.set_relation("lives in", "multi")
    say(store, "Ada lives in Oslo.", "Ada lives in Rome.")
    store.set_relation("lives_in", "single")


def test_a_relation_can_be_set_and_forgotten(store):
    store.set_relation("Lives  in", "multi")
    assert store.relations() == {"lives in": "multi"}
    say(store, "Ada lives in Oslo.", "Ada lives in Rome.")
    assert store.count() == 2
    store.set_relation("lives in", None)
    assert store.relations() == {}
    with pytest.raises(UsageError, match="single or multi"):
        store.set_relation(" ", "multi")


def test_two_values_of_a_relation_that_has_one_are_a_conflict(store):
    two_homes(store)
    assert pairs(store) == [("values", "m1", "m2")]
    change = say(store, "Ada lives in Bern.")
    assert (change.superseded, texts(store), pairs(store)) == (2, ["Ada lives in Bern."], [])


def test_close_sentences_are_shown_and_others_are_not(store):
    say(
        store,
        "It may rain in Oslo tomorrow evening",
        "It may snow in Oslo tomorrow evening",
        "The cat sat there quietly",
    )
    assert pairs(store) == [("sentences", "m1", "m2")]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ("a", ["Ada lives in Oslo."]),
        ("b", ["Ada lives in Rome."]),
        ("both", ["Ada lives in Oslo.", "Ada lives in Rome."]),
        ("merge", ["Ada lives in Oslo and Rome."]),
    ],
)
def test_a_conflict_is_settled_in_one_revision(store, keep, left):
    two_homes(store)
    before = store.revision
    store.resolve("m1", "m2", keep, author="ada")
    assert (texts(store), pairs(store)) == (left, [])
    assert store.revision - before == (keep != "both")
    assert store.check().is_whole


def test_entries_that_were_kept_side_by_side_are_shown_again_when_one_changes(store):
    say(store, "It may rain in Oslo tomorrow evening", "It may snow in Oslo tomorrow evening")
    store.resolve("m1", "m2", "both", author="ada")
    assert pairs(store) == []
    store.edit("m2", author="ada", text="It may hail in Oslo tomorrow evening")
    assert pairs(store) == [("sentences", "m1", "m2")]


def test_a_merge_may_say_it_in_other_words(store):
    say(store, "It may rain in Oslo tomorrow evening", "It may snow in Oslo tomorrow evening")
    store.resolve("m1", "m2", "merge", author="ada", text="It may rain or snow in Oslo tomorrow evening")
    assert texts(store) == ["It may rain or snow in Oslo tomorrow evening"]
    assert store.history("m2")[0].died == 2


def test_what_cannot_be_settled_is_refused(store):
    two_homes(store)
    with pytest.raises(UsageError, match="two different"):
        store.resolve("m1", "m1", "a", author="ada")
    with pytest.raises(UsageError, match="only where they are merged"):
        store.resolve("m1", "m2", "a", author="ada", text="x")
    with pytest.raises(NotFound):
        store.resolve("m1", "m3", "a", author="ada")


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=7), min_size=2, max_size=14))
@settings(max_examples=40, deadline=None)
def test_all_close_sentences_are_shown_and_no_others(tmp_path_factory, sentences):
    with MemoryStore.create(tmp_path_factory.mktemp("facts") / "facts") as store:
        # No statement: nothing that begins with "maybe" is taken apart.
        store.add([NewEntry("Maybe? " + " ".join(f"w{sign}" for sign in one)) for one in sentences], author="ada")
        assert all(entry.subject is None for entry in store.entries())
        words = {entry.id: set(entry.text.casefold().split()) for entry in store.entries()}
        close = {
            (a, b) for a, b in combinations(words, 2) if len(words[a] & words[b]) / len(words[a] | words[b]) >= 0.6
        }
        assert {(one.a.id, one.b.id) for one in store.conflicts()} == close
