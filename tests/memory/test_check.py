"""Checking: a flipped bit is found, and the entry that has it is named."""

import random
import sqlite3

import pytest

from nightschool.errors import Conflict, Damaged, MadeByNewer, NightschoolError, UsageError
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore


@pytest.fixture
def folder(tmp_path):
    with MemoryStore.create(tmp_path / "facts") as store:
        store.add((NewEntry(f"Person {n} lives in Town{n}.", source=f"chat_{n}") for n in range(60)), author="ada")
        store.add([NewEntry("Snow is expected, says Eve."), NewEntry("Person 7 lives in Oslo.")], author="ada")
        store.name_version("monday", author="ada")
        store.remove("m3", author="bob")
        store.purge("m4", author="bob")  # leaves the log empty: all is in the file
        assert store.check().is_whole
    return tmp_path / "facts"


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def all_of(folder):
    """Everything that readers can see."""
    with MemoryStore.open(folder) as store:
        rows = store.rows(range(1, 100))
        seen = [[one.row for one in store.entries(at=at)] for at in range(store.revision + 1)]
        return rows, seen, store.revisions(), store.versions(), [store.count(at=at) for at in range(store.revision + 1)]


def test_a_flipped_bit_of_an_entry_is_found_and_the_entry_named(folder):
    path = folder / "memory.db"
    place = path.read_bytes().index(b"Person 7 lives in Town7")
    flip(path, place + 20, 0)
    with MemoryStore.open(folder) as store:
        report = store.check()
        assert not report.is_whole
        assert "m8" in {one.entry for one in report.findings}


def test_no_flipped_bit_changes_what_is_read_without_being_found(folder):
    path = folder / "memory.db"
    whole, true = path.read_bytes(), all_of(folder)
    chance = random.Random(9)
    found = 0
    for _ in range(100):
        flip(path, chance.randrange(len(whole)), chance.randrange(8))
        try:
            with MemoryStore.open(folder) as store:
                is_found = not store.check().is_whole
        except NightschoolError:
            is_found = True
        found += is_found
        if not is_found:
            assert all_of(folder) == true
        for name in ("memory.db-wal", "memory.db-shm"):
            (folder / name).unlink(missing_ok=True)
        path.write_bytes(whole)
    assert found > 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DELETE FROM rows WHERE row = 5", "Revision 1 wrote 60 rows"),
        ("UPDATE rows SET died = 2 WHERE row = 5", "m5 does not end at revision 2"),
        ("UPDATE rows SET died = 2 WHERE row = 3", "m3 does not end at revision 3"),
        ("UPDATE rows SET value = 'Rome' WHERE row = 5", "m5 is not what was written"),
        ("UPDATE rows SET born = 2 WHERE row = 5", "m5 says that it was written by revision 2"),
        ("UPDATE rows SET replaces = 9 WHERE row = 62", "m8 replaces a row that is not of its entry"),
        ("UPDATE rows SET text_key = 9 WHERE row = 61", "m61 is not what was written"),
        ("UPDATE rows SET entry = 6 WHERE row = 5", "m6 is not what was written"),
        ("UPDATE versions SET revision = 1", "versions 'monday' is not what was written"),
        ("UPDATE revisions SET author = 'eve' WHERE revision = 2", "revisions 2 is not what was written"),
        ("DELETE FROM revisions WHERE revision = 1", "Revision 1 is missing"),
        ("UPDATE purged SET born = 2", "purged 4 is not what was written"),
        ("DELETE FROM addresses WHERE entry = 5", "m5 is not found by its subject and relation"),
        ("UPDATE addresses SET address = address + 1 WHERE entry = 61", "m61 is not found by its subject and relation"),
    ],
)
def test_what_was_changed_behind_its_back_is_found(folder, change, said):
    with sqlite3.connect(folder / "memory.db") as connection:
        connection.execute(change)
    connection.close()
    with MemoryStore.open(folder) as store:
        assert said in " ".join(one.message for one in store.check().findings)


def test_a_file_that_is_no_memory_is_refused(folder, tmp_path):
    with sqlite3.connect(folder / "memory.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(MadeByNewer, match="form 99"):
        MemoryStore.open(folder)
    (folder / "memory.db").write_bytes(b"no database at all, whatever its name says" * 100)
    with pytest.raises(Damaged, match="not a database"):
        MemoryStore.open(folder)


def of_form_1(folder):
    """Make a memory what it would have been before there were addresses."""
    with sqlite3.connect(folder / "memory.db") as connection:
        connection.executescript(
            "DROP TABLE addresses; DROP INDEX rows_entry; PRAGMA user_version = 1;"
            "CREATE INDEX rows_entry ON rows (entry, row);"
            "CREATE INDEX rows_address ON rows (subject_key, relation_key) WHERE died IS NULL AND subject_key IS NOT NULL;"
            "CREATE INDEX rows_sentence ON rows (text_key) WHERE died IS NULL AND text_key IS NOT NULL;"
        )
    connection.close()


def test_a_file_of_the_form_before_is_brought_to_this_one(folder):
    true = all_of(folder)
    of_form_1(folder)
    assert all_of(folder) == true
    with MemoryStore.open(folder) as store:
        assert store.check().is_whole
        assert [one.id for one in store.about("person 7")] == ["m8"]
        assert store.add([NewEntry("Snow is expected, says Eve.")], author="ada").ids == ["m61"]


def test_a_file_of_the_form_before_that_cannot_be_written_is_refused(folder, monkeypatch):
    of_form_1(folder)
    monkeypatch.setattr("nightschool.memory.store.connection.os.access", lambda *_: False)
    with pytest.raises(Conflict, match="older nightschool"):
        MemoryStore.open(folder)


def test_a_memory_that_cannot_be_written_can_be_read(folder, monkeypatch):
    # Permissions do not hold for root, who may run the tests.
    monkeypatch.setattr("nightschool.memory.store.connection.os.access", lambda *_: False)
    with MemoryStore.open(folder) as store:
        assert store.get("m8").value == "Oslo"
        assert store.check().is_whole
        with pytest.raises(NightschoolError, match="cannot be written"):
            store.remove("m8", author="ada")


DAMAGE = pytest.mark.parametrize("put", [b"Town0", b"Town\xff"], ids=["another letter", "no text"])


def damage(folder, put):
    """Let row 10 say something else than `Person 9 lives in Town9.`, as a flipped bit would."""
    path = folder / "memory.db"
    content = path.read_bytes()
    place = content.index(b"Person 9 lives in Town9")
    path.write_bytes(content[: place + 18] + put + content[place + 23 :])


@DAMAGE
def test_whoever_reads_a_damaged_row_is_told_so(folder, put):
    damage(folder, put)
    with MemoryStore.open(folder) as store:
        assert [one.id for one in store.entries() if one.damaged] == ["m10"]
        assert store.get("m10").damaged
        assert not store.get("m11").damaged
        assert [one.damaged for one in (*store.history("m10"), *store.about("Person 9"), *store.search("Person 9"))][
            :2
        ] == [True, True]
        assert store.get("m10").to_json()["damaged"]
        with pytest.raises(Damaged, match="Row 10 of m10 is not what was written"):
            list(store.sound_entries())


@DAMAGE
def test_a_damaged_row_can_be_written_anew_ended_and_purged(folder, put):
    damage(folder, put)
    with MemoryStore.open(folder) as store:
        with pytest.raises(UsageError, match="Only its whole text can take the place"):
            store.edit("m10", author="ada", value="Rome")
        with pytest.raises(UsageError, match="Give the text of the merged entry"):
            store.resolve("m11", "m10", "merge", author="ada")
        with pytest.raises(UsageError, match="cannot be taken back as it is"):
            store.retract(("friends/m10", store.get("m10")), author="ada")
        store.edit("m10", author="ada", text="Person 9 lives in Town9.")
        assert [one.damaged for one in store.history("m10")] == [True, False]
        assert [one.text for one in store.sound_entries()].count("Person 9 lives in Town9.") == 1
        store.remove("m10", author="ada")
        assert store.purge("m10", author="ada").num_rows == 2
        assert store.check().is_whole
    connection = sqlite3.connect(folder / "memory.db")
    assert not connection.execute("SELECT * FROM addresses WHERE entry = 10").fetchall()
    connection.close()


def test_a_row_whose_keys_are_damaged_can_be_ended_and_leaves_nothing_behind(folder):
    with sqlite3.connect(folder / "memory.db") as connection:
        connection.execute(
            "UPDATE rows SET subject_key = 'person 8', relation_key = NULL, text_key = NULL WHERE row = 10"
        )
    connection.close()
    with MemoryStore.open(folder) as store:
        store.remove("m10", author="ada")
        store.purge("m10", author="ada")
        assert store.check().is_whole
    connection = sqlite3.connect(folder / "memory.db")
    assert not connection.execute("SELECT * FROM addresses WHERE entry = 10").fetchall()
    connection.close()
