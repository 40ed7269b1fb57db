"""Memories that lie over one another: the upper one hides what it says otherwise, and nothing of it is seen elsewhere."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nightschool.errors import UsageError
from nightschool.memory.entry import NewEntry
from nightschool.memory.layers import Layer, Layers, search_words
from nightschool.memory.memory import Memory
from nightschool.memory.store import MemoryStore
from tests.support.memory_parts import encoder, vocabulary


@pytest.fixture
def made(tmp_path):
    """Makes a memory of facts."""
    opened = []

    def make(name, *rows):
        with MemoryStore.create(tmp_path / name) as store:
            store.add([NewEntry(subject=s, relation=r, value=v) for s, r, v in rows], author="me")
        opened.append(Memory.open(tmp_path / name, encoder(), vocabulary()))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def found(asked, question):
    [finding] = asked.find([question], k=8)
    return {one.id: one.entry.value for one in finding.found}


def test_the_upper_one_hides_what_it_says_otherwise_and_the_rest_shows(made):
    facts = made("facts", ("Ada Byron", "lives in", "Oslo"), ("Ada Byron", "native language", "English"))
    mine = made("mine", ("Ada Byron", "lives in", "Bath"), ("Rex", "is a", "dog"))
    both = Layers("facts", [Layer("mine", mine), Layer("facts", facts)])
    assert found(both, "Where does Ada Byron live?") == {"mine/m1": "Bath", "m2": "English"}
    assert found(both, "What is Rex?") == {"mine/m2": "dog"}
    assert found(facts, "Where does Ada Byron live?") == {"m1": "Oslo", "m2": "English"}
    [finding] = both.find(["Where does Ada Byron live?"])
    assert (finding.revision, finding.revisions) == (1, (("mine", 1), ("facts", 1)))
    assert {one.memory for one in finding.found} == {"facts", "mine"}


def test_several_values_of_a_relation_stand_beside_each_other(made):
    facts = made("facts", ("Ada Byron", "languages spoken", "English"))
    mine = made("mine", ("Ada Byron", "languages spoken", "French"))
    both = Layers("facts", [Layer("mine", mine), Layer("facts", facts)])
    assert set(found(both, "What languages are spoken by Ada Byron?").values()) == {"English", "French"}


def test_what_ends_above_lets_what_is_beneath_show_again(made):
    facts = made("facts", ("Ada Byron", "lives in", "Oslo"))
    mine = made("mine", ("Ada Byron", "lives in", "Bath"))
    both = Layers("facts", [Layer("mine", mine), Layer("facts", facts)])
    mine.store.edit("m1", author="me", value="Rome")
    assert found(both, "Where does Ada Byron live?") == {"mine/m1": "Rome"}
    mine.store.remove("m1", author="me")
    assert found(both, "Where does Ada Byron live?") == {"m1": "Oslo"}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder, memories = tmp_path_factory.mktemp("layers"), []
    for depth in range(3):
        with MemoryStore.create(folder / f"layer{depth}") as store:
            store.add([NewEntry(subject="Rex", relation="is a", value="dog")], author="me")
        memories.append(Memory.open(folder / f"layer{depth}", encoder(), vocabulary()))
    yield memories
    for memory in memories:
        memory.close()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.sampled_from([None, "Oslo", "Bath", "Rome"]), min_size=3, max_size=3))
def test_the_uppermost_that_says_anything_is_believed(three, values):
    for memory, value in zip(three, values, strict=True):
        memory.store.rollback(1, author="me")
        if value is not None:
            memory.store.add([NewEntry(subject="Ada Byron", relation="lives in", value=value)], author="me")
    told = found(Layers("layer2", [Layer(one.name, one) for one in three]), "Where does Ada Byron live?")
    assert list(told.values()) == [value for value in values if value is not None][:1]


def test_what_is_taken_back_above_is_hidden_until_that_ends(made):
    facts = made("facts", ("Ada Byron", "lives in", "Oslo"), ("Ada Byron", "native language", "English"))
    mine = made("mine", ("Rex", "is a", "dog"))
    both = Layers("mine", [Layer("mine", mine), Layer("facts", facts)])
    where = "Where does Ada Byron live?"
    change = mine.store.retract(("facts/m1", facts.store.get("m1")), author="me")
    assert found(both, where) == {"facts/m2": "English"}
    assert found(mine, where) == {}  # a retraction says nothing that could be read
    assert found(facts, where)["m1"] == "Oslo"
    [entry] = [mine.store.get(one) for one in change.ids]
    assert (entry.text, entry.source) == ("No longer: Ada Byron lives in Oslo.", "facts/m1")
    facts.store.edit("m1", author="you", value="Rome")  # is another statement
    assert found(both, where)["facts/m1"] == "Rome"
    facts.store.add([NewEntry("Ada Byron resides in oslo.")], author="you")
    assert found(both, where) == {"facts/m2": "English"}
    mine.store.undo(author="me")
    assert found(both, where)["facts/m1"] == "oslo"
    mine.store.add([NewEntry("Ada Byron no longer lives in Oslo.")], author="me")
    assert found(both, where) == {"facts/m2": "English"}
    with pytest.raises(UsageError, match="only takes something back"):
        facts.store.retract(("mine/m3", mine.store.get("m3")), author="you")


# One that the rules read otherwise than it was given, one that they cannot read, and a sentence.
@pytest.mark.parametrize(
    "fact",
    [
        NewEntry(subject="Mr. Who is it", relation="ist verheiratet mit", value="Eve of the was a"),
        NewEntry(subject="阿達", relation="住在", value="奧斯陸"),
        NewEntry("Snow, says Zelda Quux, is expected!"),
        NewEntry("x" * 4000),
    ],
)
def test_any_statement_can_be_taken_back_and_comes_back_from_a_file(tmp_path, fact):
    with MemoryStore.create(tmp_path / "facts") as facts, MemoryStore.create(tmp_path / "mine") as mine:
        facts.add([fact, NewEntry("Bob likes tea.")], author="me")
        stated, other = facts.get("m1"), facts.get("m2")
        mine.retract(("facts/m1", stated), author="me")
        assert mine.hides(stated)
        assert not mine.hides(stated, at=0)
        assert not mine.hides(other)
        kept = mine.get("m1")
        with MemoryStore.create(tmp_path / "copy") as copy:
            copy.add([NewEntry(kept.text, source=kept.source)], author="me")
            assert copy.hides(stated)
        assert facts.retract(("mine/m0", stated), author="me").removed == 1
        mine.remove("m1", author="me")
        assert not mine.hides(stated)


def test_what_is_said_again_is_taken_back_again(tmp_path):
    with MemoryStore.create(tmp_path / "facts") as store:
        for _ in range(2):
            store.add([NewEntry("Ada lives in Oslo.")], author="me")
            assert store.add([NewEntry("Ada no longer lives in Oslo.")], author="me").removed == 1
        assert [one.text for one in store.entries()] == ["Ada no longer lives in Oslo."]


def test_words_are_searched_as_questions_are_asked(made):
    facts = made("facts", ("Ada Byron", "lives in", "Oslo"), ("Ada Byron", "native language", "English"))
    mine = made("mine", ("Ada Byron", "native language", "French"))
    mine.store.retract(("facts/m1", facts.store.get("m1")), author="me")
    revisions, entries = search_words([("mine", mine.store), ("facts", facts.store)], "ada oslo", 5)
    assert revisions == {"mine": 2, "facts": 1}
    assert [(label, entry.value) for label, entry in entries] == [("mine", "French")]
