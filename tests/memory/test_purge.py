"""Purging: nothing of an entry is left, and what was purged is said."""

import sqlite3

import pytest

from nightschool.errors import Locked, NotFound
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore, purge

SECRET = "Zerlinda Quux"


@pytest.fixture
def store(tmp_path):
    with MemoryStore.create(tmp_path / "facts") as made:
        yield made


def bytes_of(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def fill(store, count=400):
    """Entries among which those of the secret lie, with pages that split and histories."""
    store.add((NewEntry(f"Person {n} lives in Town{n}.") for n in range(count)), author="ada")
    store.add(
        [
            NewEntry(f"{SECRET} lives in Oslo.", source="chat with Zerlinda Quux"),
            NewEntry(f"The doctor of {SECRET} is Dr. Hyde."),
        ],
        author="ada",
    )
    store.name_version("before", author="ada")
    store.edit(f"m{count + 1}", author="ada", value="Rome")
    store.add((NewEntry(f"Person {n + 0.5} lives in Town{n}.") for n in range(count)), author="ada")
    store.rollback("before", author="ada")
    return f"m{count + 1}", f"m{count + 2}"


def test_a_purged_entry_is_in_no_byte_of_the_file_or_its_log(store):
    secrets = fill(store)
    assert SECRET.encode() in bytes_of(store.folder)
    done = store.purge(*secrets, author="ada")
    assert (done.entries, done.num_rows, done.versions) == (secrets, 4, ("before",))
    left = bytes_of(store.folder)
    for word in (b"Zerlinda", b"zerlinda", b"Quux", b"Hyde"):
        assert word not in left
    with sqlite3.connect(store.folder / "memory.db") as connection:
        numbers = [int(secret[1:]) for secret in secrets]
        assert not connection.execute("SELECT * FROM addresses WHERE entry IN (?, ?)", numbers).fetchall()
    connection.close()
    assert store.count() == store.count(at="before") == 400
    assert store.check().is_whole
    with pytest.raises(NotFound, match="was purged: nothing of it is left"):
        store.get(secrets[0])
    with pytest.raises(NotFound, match="was purged"):
        store.history(secrets[0])
    store.rollback(2, author="ada")
    assert b"Zerlinda" not in bytes_of(store.folder)


def test_a_purge_is_told_to_whoever_follows(store):
    store.add([NewEntry("Ada lives in Oslo."), NewEntry("Bob lives in Rome.")], author="ada")
    store.edit("m1", author="ada", value="Bern")
    store.purge("m1", author="ada")
    assert [(one.kind, one.row) for one in store.changes_since(2)] == [("purged", 1), ("purged", 3)]
    told = [(one.kind, one.row) for one in store.changes_since(0)]
    assert told == [("born", 2), ("purged", 1), ("purged", 3)]
    assert (store.count(), store.count(at=1), store.count(at=2)) == (1, 1, 1)
    assert store.add([NewEntry("Eve lives in Linz.")], author="ada").ids == ["m4"]


def test_an_entry_that_ended_is_purged_and_told(store):
    store.add([NewEntry("Ada lives in Oslo.")], author="ada")
    store.remove("m1", author="ada")
    assert store.purge("m1", author="ada").revision == store.revision == 3
    assert [(one.kind, one.row) for one in store.changes_since(2)] == [("purged", 1)]


def test_the_index_goes_with_what_it_was_made_of(store):
    store.add([NewEntry("Ada lives in Oslo."), NewEntry("Bob lives in Rome.")], author="ada")
    for each in ("0123456789abcdef", "fedcba9876543210"):
        (store.folder / purge.INDEX_FOLDER / each).mkdir(parents=True)
        (store.folder / purge.INDEX_FOLDER / each / "tokens.npy").write_bytes(b"what Ada said")
    assert store.purge("m1", author="ada").index_dropped
    assert not (store.folder / purge.INDEX_FOLDER).exists()
    assert not store.purge("m2", author="ada").index_dropped


def test_an_unknown_entry_purges_nothing(store):
    store.add([NewEntry("Ada lives in Oslo.")], author="ada")
    with pytest.raises(NotFound, match="no entry m9"):
        store.purge("m1", "m9", author="ada")
    assert store.count() == 1


def test_a_purge_that_was_cut_off_is_found_and_goes_on(store, monkeypatch):
    secrets = fill(store, 50)

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(purge, "write_anew", killed)
        with pytest.raises(KeyboardInterrupt):
            store.purge(*secrets, author="ada")
    assert [one.message for one in store.check().findings] == [
        "A purge was cut off: what it deleted may still be in the file. Purge again to finish it."
    ]
    store.purge(*secrets, author="ada")
    assert store.check().is_whole
    assert b"Zerlinda" not in bytes_of(store.folder)
    with pytest.raises(NotFound, match="was purged"):
        store.purge(*secrets, author="ada")


def test_a_reader_that_stays_is_said_and_the_purge_goes_on_afterwards(store, monkeypatch):
    monkeypatch.setattr(purge, "_WAIT_SECONDS", 0)
    secrets = fill(store, 50)
    reader = sqlite3.connect(store.folder / "memory.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM rows").fetchone()
    with pytest.raises(Locked, match="another process reads"):
        store.purge(*secrets, author="ada")
    reader.close()
    store.purge(*secrets, author="ada")
    assert b"Zerlinda" not in bytes_of(store.folder)
    assert store.check().is_whole
