"""The file of the reference server `server-memory`: read, written, and read again."""

import json
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.errors import DataError
from nightschool.events import now
from nightschool.memory.entry import NewEntry
from nightschool.memory.facts import key_of
from nightschool.memory.graph_entries import graph_of
from nightschool.memory.graph_files import graph_lines, read_graph
from nightschool.memory.store import MemoryStore

# What people write, and anything that can be seen.
SEEN = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12)
NAMES = st.sampled_from(["Ada", "ada", "Ada_Lovelace", "Acme", "the Acme", "Oslo", "Eve's cat"]) | SEEN.filter(key_of)
OBSERVATIONS = (
    st.sampled_from(
        ["lives in Oslo", "lives in Rome", "Up at six!", "speaks French", "Ada's mother is Eve.", "born in 1815"]
    )
    | SEEN.filter(key_of)
    | st.tuples(NAMES, st.sampled_from(["is a poet", "works at Acme"])).map(" ".join)
)
ENTITIES = st.fixed_dictionaries(
    {
        "type": st.just("entity"),
        "name": NAMES,
        "entityType": st.sampled_from(["person", "company", "city, small"]) | SEEN.filter(key_of),
        "observations": st.lists(OBSERVATIONS, max_size=4),
    }
)
RELATIONS = st.fixed_dictionaries(
    {
        "type": st.just("relation"),
        "from": NAMES,
        "to": NAMES,
        "relationType": st.sampled_from(["works at", "knows", "lives in", "is a"]) | SEEN.filter(key_of),
    }
)
FILES = st.lists(ENTITIES | RELATIONS, min_size=1, max_size=8)
TRIPLES = st.tuples(NAMES, st.sampled_from(["lives in", "speaks", "mother", "has observation", "is a"]), NAMES)
STORES = st.lists(TRIPLES | OBSERVATIONS, min_size=1, max_size=8)


@contextmanager
def two_memories():
    """A folder, and two empty memories in it."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        with MemoryStore.create(folder / "one") as one, MemoryStore.create(folder / "other") as other:
            yield folder, one, other


def imported(store, path):
    store.add(read_graph(path), author="test", operation="import")
    return store


def exported(store, path):
    written = graph_lines(store, store.revision)
    path.write_text("".join(written.lines), "utf-8")
    return written


def graph(store):
    """What a client reads, in no order; a name that is spelled in several ways may be shown in any of them."""
    found = graph_of(store.entries())
    entities = {key_of(one["name"]): (one["entityType"], sorted(one["observations"])) for one in found["entities"]}
    return entities, sorted((key_of(one["from"]), one["relationType"], one["to"]) for one in found["relations"])


ROUND = settings(max_examples=30, deadline=None, derandomize=True)


@ROUND
@given(lines=FILES)
def test_a_file_that_was_read_is_written_so_that_it_reads_the_same(lines):
    with two_memories() as (folder, one, other):
        path, again = folder / "memory.jsonl", folder / "again.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
        imported(one, path)
        assert exported(one, again).left_out == 0
        assert graph(imported(other, again)) == graph(one)


@ROUND
@given(facts=STORES)
def test_a_memory_that_was_written_reads_the_same_elsewhere(facts):
    with two_memories() as (folder, one, other):
        for fact in facts:
            one.add([NewEntry(fact) if isinstance(fact, str) else NewEntry("", *fact)], author="test")
        written = exported(one, folder / "memory.jsonl")
        about_nobody = [entry for entry in one.entries() if entry.subject is None]
        assert written.left_out == len(about_nobody)
        if len(about_nobody) < one.count():
            assert graph(imported(other, folder / "memory.jsonl")) == graph(one)


ADA = '{"type": "entity", "name": "Ada", "entityType": "person", "observations": ["lives in Oslo", "Up at six!"]}'
WORKS = '{"type": "relation", "from": "Ada", "to": "Acme", "relationType": "works at"}'
ACME = '{"type": "entity", "name": "Acme", "entityType": "company", "observations": [], "createdAt": "yesterday"}'


def test_entities_are_subjects_and_relations_lead_from_one_to_another():
    with two_memories() as (folder, store, _):
        (folder / "memory.jsonl").write_text(f"{ADA}\n\n{WORKS}\n{ACME}", "utf-8")
        imported(store, folder / "memory.jsonl")
        said = [(one.subject, one.relation, one.value, one.source) for one in store.entries()]
        exported(store, folder / "memory.jsonl")
        lines = [json.loads(line) for line in (folder / "memory.jsonl").read_text("utf-8").splitlines()]
    assert said == [
        ("Ada", "is a", "person", "memory.jsonl"),
        ("Ada", "lives in", "Oslo", "memory.jsonl"),
        ("Ada", "has observation", "Up at six!", "memory.jsonl"),
        ("Ada", "works at", "Acme", "memory.jsonl"),
        ("Acme", "is a", "company", "memory.jsonl"),
    ]
    assert lines == [
        json.loads(ADA) | {"observations": ["Ada lives in Oslo", "Up at six!"]},
        {key: value for key, value in json.loads(ACME).items() if key != "createdAt"},
        json.loads(WORKS),
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("no JSON", "memory.jsonl:3: the line is no JSON"),
        ("[" * 100_000, "memory.jsonl:3: the line is no JSON"),
        ("[]", "memory.jsonl:3: the line is no object"),
        ('{"type": "person", "name": "Ada"}', "memory.jsonl:3: the type is 'person'"),
        ('{"type": "entity", "name": "Bo"}', "memory.jsonl:3: the field 'entityType' is missing"),
        ('{"type": "entity", "name": 7, "entityType": "person"}', "memory.jsonl:3: the field 'name' holds int"),
        ('{"type": "entity", "name": "Bo", "entityType": "", "observations": []}', "memory.jsonl:3: the entity 'Bo' has no type"),
        ('{"type": "entity", "name": "Bo", "entityType": "person", "observations": "tall"}', "memory.jsonl:3: the field 'observations'"),
        ('{"type": "entity", "name": "Bo", "entityType": "person", "observations": [""]}', "memory.jsonl:3: The fact is empty"),
        ('{"type": "entity", "name": " ", "entityType": "person"}', "memory.jsonl:3: The fact has no subject"),
        ('{"type": "relation", "from": "Bo", "to": "", "relationType": "knows"}', "memory.jsonl:3: The fact has no value"),
        ('{"type": "relation", "from": "Bo", "to": "\\ud800", "relationType": "knows"}', "memory.jsonl:3: The value is not UTF-8"),
    ],
)  # fmt: skip
def test_a_bad_line_is_told_by_its_number_and_nothing_is_stored(line, told):
    with two_memories() as (folder, store, _):
        (folder / "memory.jsonl").write_text(f"{ADA}\n{WORKS}\n{line}\n{ACME}\n", "utf-8")
        with pytest.raises(DataError) as refused:
            imported(store, folder / "memory.jsonl")
        assert told in str(refused.value)
        assert (store.revision, store.count()) == (0, 0)


def test_a_file_without_lines_is_none_of_it():
    with two_memories() as (folder, store, _):
        (folder / "memory.jsonl").write_text("\n\n", "utf-8")
        with pytest.raises(DataError, match="holds no entities"):
            imported(store, folder / "memory.jsonl")


def test_an_entity_of_which_only_relations_tell_comes_back():
    with two_memories() as (folder, one, other):
        one.add([NewEntry("", "Bo", "knows", "Ada"), NewEntry("", "Ada", "is a", "person")], author="test")
        exported(one, folder / "memory.jsonl")
        assert '"entityType": "", "observations": []' in (folder / "memory.jsonl").read_text("utf-8")
        assert graph(imported(other, folder / "memory.jsonl")) == graph(one)


def test_what_the_file_cannot_hold_is_counted():
    with two_memories() as (folder, store, _):
        store.add([NewEntry("It may rain."), NewEntry("Ada lives in Oslo.", valid_from=now())], author="test")
        written = exported(store, folder / "memory.jsonl")
        assert (written.left_out, written.undated) == (1, 1)
