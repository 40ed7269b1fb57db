"""Ids, the memories of them, and the sources that name them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.errors import UsageError
from nightschool.memory.entity_ids import EntityIds, ids_of, is_of
from nightschool.memory.entry import NewEntry
from nightschool.memory.facts import as_fact
from nightschool.store.names import is_name

IDS = st.builds(EntityIds, *[st.none() | st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)] * 4)


@given(IDS)
def test_a_source_names_its_ids_also_when_it_was_stored(ids):
    stored = as_fact(NewEntry("Ada lives in Oslo.", source=ids.source("mem0"))).source
    assert ids_of(stored) == ids


@given(IDS, IDS)
def test_other_ids_have_another_memory_beside_the_same_one(one, other):
    assert (one.memory("friends") == other.memory("friends")) == (one == other)
    assert is_name(one.memory("friends"))
    assert is_of(one.memory("friends"), "friends")
    assert not is_of(one.memory("friends"), "enemies")


@pytest.mark.parametrize("memory", ["friend", "friends-", "friends-facts", "friends-0123456789abcdef0", "friends2"])
def test_a_memory_of_another_name_is_not_of_it(memory):
    assert not is_of(memory, "friends")


@pytest.mark.parametrize("source", ["", "mem0", "chat_88", "a?b=c", "https://example.com/?user_id=ada&page=2"])
def test_a_source_of_another_make_names_nobody(source):
    assert not ids_of(source)


def test_ids_that_no_source_can_keep_are_refused():
    with pytest.raises(UsageError, match="shorter"):
        EntityIds("ü" * 400).source("mem0")
