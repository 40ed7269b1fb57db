"""The store of an explicit memory: what is kept, what supersedes what, and what readers see."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from nightschool.errors import Conflict, DataError, NotFound, UsageError
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore


@pytest.fixture
def store(tmp_path):
    with MemoryStore.create(tmp_path / "facts") as made:
        yield made


def say(store, *sentences, **more):
    return store.add([NewEntry(one, **more) for one in sentences], author="ada")


def texts(store, at=None):
    return [one.text for one in store.entries(at=at)]


def test_an_entry_keeps_what_is_known_of_it(store):
    begin = datetime(2020, 5, 1, tzinfo=UTC)
    change = store.add([NewEntry("Ada lives in Oslo.", source="chat_88", valid_from=begin)], author="bob")
    one = store.get(change.ids[0])
    assert (one.id, one.row, one.born, one.died) == ("m1", 1, 1, None)
    assert (one.text, one.subject, one.relation, one.value) == ("Ada lives in Oslo.", "Ada", "lives in", "Oslo")
    assert (one.source, one.author, one.valid_from, one.valid_to) == ("chat_88", "bob", begin, None)
    assert one.recorded_at.tzinfo is not None


def test_a_new_value_supersedes_and_nothing_is_overwritten(store):
    say(store, "Ada lives in Oslo.")
    change = say(store, "Ada lives in Rome.")
    assert (change.added, change.superseded, change.ids) == (0, 1, ["m1"])
    assert texts(store) == ["Ada lives in Rome."]
    assert texts(store, at=1) == ["Ada lives in Oslo."]
    old, new = store.history("m1")
    assert (old.died, new.born, new.replaces) == (2, 2, old.row)


def test_spelling_alone_makes_no_other_subject_relation_or_value(store):
    say(store, "Ada lives in Oslo.")
    change = store.add([NewEntry(subject="  ADA ", relation="lives_in", value="oslo")], author="ada")
    assert (change.unchanged, change.revision, change.ids) == (1, 1, ["m1"])


def test_a_relation_with_several_values_keeps_them_all(store):
    say(store, "Ada speaks French.", "Ada speaks English.")
    assert texts(store) == ["Ada speaks French.", "Ada speaks English."]
    assert say(store, "Ada speaks French.").unchanged == 1


def test_sentences_whose_subject_cannot_be_told_stay_side_by_side(store):
    say(store, "Rain is expected tomorrow, says Ada.", "Snow is expected tomorrow, says Ada.")
    assert store.count() == 2
    assert say(store, "rain is expected tomorrow, says Ada").unchanged == 1
    assert store.get("m1").subject is None


def test_what_held_at_another_time_is_not_superseded(store):
    then, now = datetime(2010, 1, 1, tzinfo=UTC), datetime(2020, 1, 1, tzinfo=UTC)
    say(store, "Ada lives in Rome.", valid_from=then, valid_to=now)
    say(store, "Ada lives in Oslo.", valid_from=now)
    assert texts(store) == ["Ada lives in Rome.", "Ada lives in Oslo."]


def test_an_edit_keeps_the_entry_and_the_address(store):
    say(store, "Ada lives in Oslo.", source="chat_1")
    store.edit("m1", author="bob", value="Rome", source="chat_2")
    one = store.get("m1")
    assert (one.text, one.row, one.replaces, one.author, one.source) == ("Ada lives in Rome.", 2, 1, "bob", "chat_2")
    assert store.get("m1", at=1).text == "Ada lives in Oslo."
    assert store.edit("m1", author="bob", value="Rome").unchanged == 1
    store.edit("m1", author="bob", text="The capital of Norway is Oslo.")
    assert (store.get("m1").subject, store.get("m1").relation, store.get("m1").source) == ("Norway", "capital", "")


def test_an_edit_supersedes_whatever_else_says_another_value_of_the_same(store):
    say(store, "Ada lives in Oslo.", "Bob lives in Rome.")
    store.edit("m2", author="ada", text="Ada lives in Rome.")
    assert [one.id for one in store.entries()] == ["m2"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "Nothing of m1 is to change"),
        ({"text": "Eve sings.", "value": "x"}, "not both"),
        ({"text": "  "}, "The fact is empty"),
    ],
)
def test_an_edit_that_makes_no_sense_changes_nothing(store, change, said):
    say(store, "Ada lives in Oslo.")
    with pytest.raises((UsageError, DataError), match=said):
        store.edit("m1", author="ada", **change)
    assert store.revision == 1


def test_a_removed_entry_stays_in_the_history(store):
    say(store, "Ada lives in Oslo.", "Bob lives in Rome.")
    assert store.remove("m1", author="ada").removed == 1
    assert texts(store) == ["Bob lives in Rome."]
    with pytest.raises(NotFound, match="ended at revision 2"):
        store.get("m1")
    assert store.history("m1")[0].died == 2
    assert store.count() == 1
    assert store.count(at=1) == 2


def test_an_entry_that_never_was_is_not_found(store):
    with pytest.raises(NotFound, match="no entry m7"):
        store.get("m7")
    with pytest.raises(UsageError, match="looks like m123"):
        store.get("7; drop table rows")
    with pytest.raises(NotFound, match="no revision 5"):
        store.entries(at=5).__next__()


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        (NewEntry(" \n "), "empty"),
        (NewEntry(subject="Ada", relation="lives in"), "no value"),
        (NewEntry("x" * 5000), "5000 characters"),
        (NewEntry("bad \udc80 bytes"), "not UTF-8"),
        (
            NewEntry("A b.", valid_from=datetime(2020, 1, 1, tzinfo=UTC), valid_to=datetime(2019, 1, 1, tzinfo=UTC)),
            "before it begins",
        ),
    ],
)
def test_what_is_no_fact_is_refused_with_its_number_and_nothing_is_stored(store, fact, said):
    with pytest.raises(DataError, match=rf"Fact 2: .*{said}.*Nothing was stored"):
        store.add([NewEntry("Ada lives in Oslo."), fact], author="ada")
    assert (store.count(), store.revision) == (0, 0)


def test_ten_thousand_contradictory_values_of_one_fact_leave_one(store):
    change = store.add((NewEntry(f"Ada lives in Town{n}.") for n in range(10_000)), author="ada")
    assert (change.added, change.superseded, store.count()) == (1, 9_999, 1)
    assert texts(store) == ["Ada lives in Town9999."]
    assert len(store.history("m1")) == 10_000


def test_changes_tell_births_before_deaths_in_the_order_of_revisions(store):
    say(store, "Ada lives in Oslo.", "Bob lives in Rome.")
    say(store, "Ada lives in Rome.", "Ada lives in Bern.")
    store.remove("m2", author="ada")
    told = [(one.revision, one.kind, one.row) for one in store.changes_since(0)]
    assert told == [
        (1, "born", 1), (1, "born", 2),
        (2, "born", 3), (2, "born", 4), (2, "died", 1), (2, "died", 3),
        (3, "died", 2),
    ]  # fmt: skip
    assert [(one.kind, one.row) for one in store.changes_since(2)] == [("died", 2)]
    assert list(store.changes_since(3)) == []
    alive = {}
    for one in store.changes_since(0):
        if one.kind == "born":
            alive[one.row] = one.entry
        else:
            del alive[one.row]
    assert [one.text for one in alive.values()] == texts(store)


def test_more_changes_than_a_page_are_told_once_each(store):
    store.add((NewEntry(f"P{n} lives in Oslo.") for n in range(2500)), author="ada")
    store.remove(*(f"m{n}" for n in range(1, 2101)), author="ada")
    told = [(one.kind, one.row) for one in store.changes_since(0)]
    assert told == [("born", n) for n in range(1, 2501)] + [("died", n) for n in range(1, 2101)]
    assert len(texts(store)) == 400


def test_rows_are_found_by_their_numbers_even_when_they_ended(store):
    say(store, "Ada lives in Oslo.")
    say(store, "Ada lives in Rome.")
    assert [one and one.value for one in store.rows([2, 1, 9])] == ["Rome", "Oslo", None]


def test_a_memory_is_made_once_and_found_again(tmp_path, store):
    with pytest.raises(Conflict, match="already"):
        MemoryStore.create(store.folder)
    with pytest.raises(NotFound, match="no memory 'other'"):
        MemoryStore.open(tmp_path / "other")
    say(store, "Ada lives in Oslo.")
    with MemoryStore.open(store.folder) as again:
        assert (texts(again), again.identity) == (["Ada lives in Oslo."], store.identity)


def test_a_memory_that_is_being_made_is_not_there_or_there(tmp_path):
    def opened(folder):
        while True:
            try:
                return MemoryStore.open(folder)
            except NotFound:
                continue

    with ThreadPoolExecutor(4) as pool:
        for number in range(30):
            folder = tmp_path / f"m{number}"
            waiting = [pool.submit(opened, folder) for _ in range(4)]
            MemoryStore.create(folder).close()
            for one in waiting:
                one.result().close()


def test_a_reader_sees_what_another_process_wrote(store):
    with MemoryStore.open(store.folder) as other:
        say(other, "Ada lives in Oslo.")
        assert store.revision == 1
        say(store, "Bob lives in Rome.")
        assert texts(other) == ["Ada lives in Oslo.", "Bob lives in Rome."]


def test_revisions_say_who_did_what(store):
    say(store, "Ada lives in Oslo.")
    store.remove("m1", author="bob")
    told = [(one.revision, one.author, one.operation, one.born, one.ended) for one in store.revisions(after=0)]
    assert told == [(1, "ada", "add", 1, 0), (2, "bob", "remove", 0, 1)]


def test_entries_are_found_by_what_they_are_about(store):
    say(store, "Ada lives in Oslo.", "Ada speaks French.", "Bob lives in Rome.", "Nothing is known of Ada, says Bob.")
    say(store, "Ada lives in Rome.")
    assert [one.text for one in store.about("the  ADA")] == ["Ada speaks French.", "Ada lives in Rome."]
    assert [one.value for one in store.about("ada", "resides in")] == ["Rome"]
    assert [one.value for one in store.about("Ada", "lives in", at=1)] == ["Oslo"]
    assert store.about("Eve") == store.about("Ada", "") == []


def test_what_was_said_of_a_subject_is_found_as_each_revision_has_it(store):
    store.add([NewEntry("Ada lives in Oslo."), NewEntry("Ada speaks English.")], author="ada")
    store.edit("m1", author="ada", text="Bob lives in Rome.")
    store.edit("m1", author="ada", text="Ada is a painter.")
    store.remove("m2", author="ada")
    said = [[one.text for one in store.about("ada", at=at)] for at in range(5)]
    assert said == [
        [],
        ["Ada lives in Oslo.", "Ada speaks English."],
        ["Ada speaks English."],
        ["Ada speaks English.", "Ada is a painter."],
        ["Ada is a painter."],
    ]
    assert [one.row for one in store.about("Bob", "lives in", at=2)] == [3]
    assert store.about("Ada", "lives in", at=4) == []
