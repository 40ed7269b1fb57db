"""What a write did, and what happened to an entry, told one by one."""

import pytest

from nightschool.errors import NotFound
from nightschool.memory.entry import NewEntry
from nightschool.memory.entry_events import events_of_entry, events_of_write
from nightschool.memory.store import MemoryStore


@pytest.fixture
def store(tmp_path):
    with MemoryStore.create(tmp_path / "facts") as store:
        yield store


def add(store, *texts):
    change = store.add([NewEntry(text) for text in texts], author="test")
    return told(events_of_write(store, change))


def told(events):
    return [(one.kind, one.entry.id, one.before and one.before.text, one.after and one.after.text) for one in events]


OSLO, ROME, TEA = "Ada lives in Oslo.", "Ada lives in Rome.", "Bob likes tea."


def test_each_fact_that_was_given_has_its_event(store):
    assert add(store, OSLO, TEA) == [("added", "m1", None, OSLO), ("added", "m2", None, TEA)]
    assert add(store, TEA, ROME) == [("unchanged", "m2", TEA, TEA), ("changed", "m1", OSLO, ROME)]
    assert add(store, TEA) == [("unchanged", "m2", TEA, TEA)]


def test_a_write_that_changes_its_own_mind_is_told_step_by_step(store):
    assert add(store, OSLO, ROME) == [("added", "m1", None, OSLO), ("changed", "m1", OSLO, ROME)]


def test_what_a_fact_ends_beside_its_own_entry_is_told_last(store):
    add(store, OSLO, TEA)
    gone = "Bob no longer likes tea."
    assert add(store, gone) == [("added", "m3", None, gone), ("ended", "m2", TEA, None)]


def test_the_events_of_a_write_are_those_of_no_other(store):
    change = store.add([NewEntry(OSLO)], author="test")
    add(store, ROME, TEA)
    assert told(events_of_write(store, change)) == [("added", "m1", None, OSLO)]


def test_an_entry_tells_all_that_happened_to_it_and_when(store):
    add(store, OSLO)
    add(store, ROME)
    store.remove("m1", author="test")
    store.rollback(1, author="test")
    events = list(events_of_entry(store, "m1"))
    assert told(events) == [
        ("added", "m1", None, OSLO),
        ("changed", "m1", OSLO, ROME),
        ("ended", "m1", ROME, None),
        ("added", "m1", None, OSLO),
    ]
    assert [one.at for one in events] == [one.at for one in store.revisions()[1:]]
    store.purge("m1", author="test")
    with pytest.raises(NotFound, match="purged"):
        list(events_of_entry(store, "m1"))
