"""Going back: undo, rollback, named versions, and the difference between two revisions."""

import pytest

from nightschool.errors import Conflict, NameRefused, NotFound
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore


@pytest.fixture
def store(tmp_path):
    with MemoryStore.create(tmp_path / "facts") as made:
        yield made


def say(store, *sentences):
    return store.add([NewEntry(one) for one in sentences], author="ada")


def texts(store, at=None):
    return sorted(one.text for one in store.entries(at=at))


def test_a_rollback_is_a_new_revision_with_the_state_of_an_old_one(store):
    say(store, "Ada lives in Oslo.", "Bob lives in Rome.")
    before = texts(store)
    say(store, "Ada lives in Bern.", "Eve lives in Linz.")
    store.remove("m2", author="ada")
    later = texts(store)
    change = store.rollback(1, author="bob")
    assert (change.revision, texts(store), texts(store, at=3)) == (4, before, later)
    assert (change.superseded, change.added, change.removed) == (1, 1, 1)
    assert {one.id for one in store.entries()} == {"m1", "m2"}
    one = store.get("m1")
    assert (one.author, one.recorded_at, one.born) == ("ada", store.history("m1")[0].recorded_at, 4)
    assert store.revisions(after=3)[0].restores == 1


def test_a_rollback_to_the_present_changes_nothing(store):
    say(store, "Ada lives in Oslo.")
    assert store.rollback(1, author="ada").revision == 1
    say(store, "Ada lives in Rome.")
    store.edit("m1", author="ada", value="Oslo")
    rows = [one.row for one in store.entries()]
    store.rollback(3, author="ada")
    assert [one.row for one in store.entries()] == rows


def test_undo_takes_back_one_write_at_a_time_and_a_new_write_begins_anew(store):
    say(store, "Ada lives in Oslo.")
    say(store, "Ada lives in Rome.")
    store.remove("m1", author="ada")
    taken_back = store.undo(author="ada")
    assert texts(store) == ["Ada lives in Rome."]
    store.undo(author="ada")
    assert texts(store) == ["Ada lives in Oslo."]
    say(store, "Ada lives in Bern.")
    store.undo(author="ada")
    assert texts(store) == ["Ada lives in Oslo."]
    store.undo(author="ada")
    assert texts(store) == []
    with pytest.raises(Conflict, match="nothing to undo"):
        store.undo(author="ada")
    # It is told of that very undo, whoever wrote since.
    assert store.undone_by(taken_back.revision) == 3


def test_a_rollback_can_be_undone(store):
    say(store, "Ada lives in Oslo.")
    say(store, "Ada lives in Rome.")
    store.rollback(0, author="ada")
    store.undo(author="ada")
    assert texts(store) == ["Ada lives in Rome."]


def test_a_purge_cannot_be_undone_but_what_was_before_it_can_come_back(store):
    say(store, "Ada lives in Oslo.", "Bob lives in Rome.")
    store.remove("m2", author="ada")
    store.purge("m1", author="ada")
    with pytest.raises(Conflict, match="roll back to revision 2"):
        store.undo(author="ada")
    store.rollback(1, author="ada")
    assert texts(store) == ["Bob lives in Rome."]


def test_a_version_is_a_name_for_a_revision(store):
    say(store, "Ada lives in Oslo.")
    version = store.name_version("monday", author="ada")
    say(store, "Ada lives in Rome.")
    assert (version.revision, [one.name for one in store.versions()]) == (1, ["monday"])
    assert texts(store, at="monday") == ["Ada lives in Oslo."]
    assert store.get("m1", at="monday").value == "Oslo"
    with pytest.raises(Conflict, match="is revision 1 already"):
        store.name_version("monday", author="ada")
    store.rollback("monday", author="ada")
    assert texts(store) == ["Ada lives in Oslo."]
    store.remove_version("monday")
    with pytest.raises(NotFound, match="Its versions: none yet"):
        store.rollback("monday", author="ada")
    with pytest.raises(NotFound):
        store.remove_version("monday")


@pytest.mark.parametrize("name", ["12", "../x", "", "A b"])
def test_a_name_that_reads_like_a_revision_or_a_path_is_refused(store, name):
    with pytest.raises(NameRefused):
        store.name_version(name, author="ada")


def test_a_difference_tells_what_was_added_removed_and_changed(store):
    say(store, "Ada lives in Oslo.", "Bob lives in Rome.", "Eve lives in Linz.")
    say(store, "Ada lives in Bern.", "Kim lives in Nice.")
    store.remove("m2", author="ada")
    say(store, "Eve lives in Graz.")
    store.undo(author="ada")

    def told(before, after=None):
        return [
            (one.id, one.kind, one.before and one.before.value, one.after and one.after.value)
            for one in store.diff(before, after)
        ]

    forward = [("m1", "changed", "Oslo", "Bern"), ("m2", "removed", "Rome", None), ("m5", "added", None, "Nice")]
    assert told(1) == forward
    backward = [("m1", "changed", "Bern", "Oslo"), ("m2", "added", None, "Rome"), ("m5", "removed", "Nice", None)]
    assert told(5, 1) == backward
    assert told(3, 3) == []
    assert told(0) == [("m1", "added", None, "Bern"), ("m3", "added", None, "Linz"), ("m5", "added", None, "Nice")]


def test_a_rollback_writes_by_what_changed_and_not_by_where_it_lies(store, tmp_path):
    facts = 8000
    store.add(
        (NewEntry(subject=f"Person {n}", relation="lives in", value=f"Town {n}") for n in range(facts)), author="ada"
    )
    changed = [NewEntry(subject=f"Person {n}", relation="lives in", value="Oslo") for n in range(0, facts, 40)]
    store.add(changed, author="ada")
    store.close()  # which empties the log
    store.rollback(1, author="ada")
    pages = (store.folder / "memory.db-wal").stat().st_size / 4096
    # 200 rows are 20 pages; each of them alone would be a page and more.
    assert pages < 60
    assert store.get("m41").value == "Town 40"
