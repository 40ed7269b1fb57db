"""Deleting a conversation takes what memories have from it, for good, and nothing else of them."""

import pytest

from nightschool.errors import Locked, NotFound
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.erasure import erase
from nightschool.memory.entry import NewEntry
from nightschool.memory.forgetting import forget_conversation, traces_with_entries
from nightschool.memory.store import MemoryStore
from nightschool.store.home import Home
from nightschool.store.names import memory_path


def remember(home, memory, *entries):
    folder = memory_path(home, memory)
    with MemoryStore.open(folder) if folder.exists() else MemoryStore.create(folder) as store:
        return store.add([NewEntry(text, source=source) for text, source in entries], author="test").ids


def said(home, memory):
    with MemoryStore.open(memory_path(home, memory)) as store:
        return sorted((one.text, one.source) for one in store.entries())


def holds(home, memory, text):
    """Whether any byte of a memory's folder tells it."""
    return any(text.encode() in path.read_bytes() for path in memory_path(home, memory).rglob("*") if path.is_file())


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home").ensure()
    for model in ("acme/bot", "bot"):
        ConversationStore(home.database).record(
            f"req-{model}", model, "v", [{"role": "user", "content": "When do you open?"}], "ok"
        )
    return home


def test_only_its_tenants_entries_from_it_go_and_no_byte_of_them_stays(home):
    remember(home, "acme/facts", ("The shop opens at 9:30.", "req-acme/bot"), ("Leon lives in Orrin.", "chat-2"))
    remember(home, "acme/others", ("The bar opens at 19:45.", "req-acme/bot"))
    remember(home, "facts", ("The shop opens at 9:30.", "req-acme/bot"))
    kept = ConversationStore(home.database).get("req-acme/bot")
    assert traces_with_entries(home, kept).memories == ("facts/m1", "others/m1")
    with MemoryStore.open(memory_path(home, "acme/facts")) as reader:  # as another process has it
        assert reader.get("m1").value
        traces, _ = forget_conversation(home, "req-acme/bot", author="test")
        with pytest.raises(NotFound, match="was purged"):
            reader.get("m1")
    assert traces.to_json()["memories"] == ["facts/m1", "others/m1"]
    assert said(home, "acme/facts") == [("Leon lives in Orrin.", "chat-2")]
    assert not holds(home, "acme/facts", "9:30")
    assert not holds(home, "acme/others", "19:45")
    assert said(home, "facts") == [("The shop opens at 9:30.", "req-acme/bot")], "another tenant's"


def test_what_came_from_elsewhere_since_stays_without_its_past(home):
    remember(home, "facts", ("Ilka lives in Morvane.", "req-bot"))
    assert remember(home, "facts", ("Ilka lives in Orrin.", "letter-7")) == ["m1"], "the new value of the same entry"
    forget_conversation(home, "req-bot", author="test")
    assert said(home, "facts") == [("Ilka lives in Orrin.", "letter-7")]
    assert not holds(home, "facts", "Morvane")


def test_a_deletion_that_a_memory_held_up_goes_on_where_it_was(home, monkeypatch):
    remember(home, "facts", ("The shop opens at 9:30.", "req-bot"))

    def locked(_):
        raise Locked("Another process reads it.")

    with monkeypatch.context() as busy:
        busy.setattr("nightschool.memory.store.purge.write_anew", locked)
        with pytest.raises(Locked):
            forget_conversation(home, "req-bot", author="test")
    assert said(home, "facts") == []
    assert ConversationStore(home.database).get("req-bot"), "it is still there, to be deleted again"
    forget_conversation(home, "req-bot", author="test")
    assert not holds(home, "facts", "9:30")
    with pytest.raises(NotFound):
        erase(home, "req-bot")
