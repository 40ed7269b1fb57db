"""Any sequence of writes agrees with a model of a few lines."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nightschool.errors import Conflict, NotFound
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore

SUBJECTS, VALUES = st.sampled_from(["Ada", "Bob", "Eve"]), st.sampled_from(["Oslo", "Rome", "Bern"])
RELATIONS = st.sampled_from(["lives in", "speaks"])


class StoreMachine(RuleBasedStateMachine):
    """`states` has what each revision shows: the entries' ids with subject, relation and value."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = MemoryStore.create(self.folder / "facts")
        self.states, self.undone = [{}], []
        self.followed, self.reached = {}, 0

    def teardown(self):
        assert self.store.check().findings == []
        self.store.close()
        shutil.rmtree(self.folder)

    @property
    def state(self):
        return self.states[-1]

    def expect(self, state, revision):
        """That a write made this state, as a revision of its own if it is another one."""
        if state != self.state:
            self.states.append(state)
            self.undone.append(len(self.states) - 2)
        assert revision == len(self.states) - 1

    @rule(subject=SUBJECTS, relation=RELATIONS, value=VALUES)
    def add(self, subject, relation, value):
        change = self.store.add([NewEntry(subject=subject, relation=relation, value=value)], author="ada")
        (entry,) = change.ids
        rivals = {key: known for key, known in self.state.items() if known[:2] == (subject, relation)}
        same = [key for key, known in rivals.items() if known[2] == value]
        if same:
            assert entry == same[0]
        elif rivals and relation == "lives in":
            assert [entry] == list(rivals)
        else:
            assert entry not in {key for state in self.states for key in state}
        self.expect(self.state | {entry: (subject, relation, value)}, change.revision)

    @rule(data=st.data(), value=VALUES)
    def edit(self, data, value):
        if self.state:
            entry = data.draw(st.sampled_from(sorted(self.state)))
            subject, relation, _ = self.state[entry]
            change = self.store.edit(entry, author="ada", value=value)
            says_it = (subject, relation, value)
            left = {key: known for key, known in self.state.items() if key == entry or known != says_it}
            unchanged = self.state[entry] == says_it
            self.expect(self.state if unchanged else left | {entry: says_it}, change.revision)

    @rule(data=st.data())
    def remove(self, data):
        if self.state:
            entry = data.draw(st.sampled_from(sorted(self.state)))
            change = self.store.remove(entry, author="ada")
            self.expect({key: known for key, known in self.state.items() if key != entry}, change.revision)

    @rule(data=st.data())
    def roll_back(self, data):
        to = data.draw(st.integers(0, len(self.states) - 1))
        self.expect(self.states[to], self.store.rollback(to, author="ada").revision)

    @rule()
    def undo(self):
        if not self.undone:
            with pytest.raises(Conflict):
                self.store.undo(author="ada")
            return
        self.store.undo(author="ada")
        self.states.append(self.states[self.undone.pop()])

    @rule(data=st.data())
    def purge(self, data):
        entries = sorted({key for state in self.states for key in state})
        if entries:
            entry = data.draw(st.sampled_from(entries))
            try:
                self.store.purge(entry, author="ada")
            except NotFound:
                return
            self.states = [{key: known for key, known in state.items() if key != entry} for state in self.states]
            self.states.append(self.state)
            # A purge cannot be undone, nor what was written before it.
            self.undone = []

    @rule(data=st.data())
    def differ(self, data):
        before, after = (data.draw(st.integers(0, len(self.states) - 1)) for _ in range(2))
        shown = {
            one.id: tuple(side and (side.subject, side.relation, side.value) for side in (one.before, one.after))
            for one in self.store.diff(before, after)
        }
        old, new = self.states[before], self.states[after]
        differing = {
            key: (old.get(key), new.get(key)) for key in old.keys() | new.keys() if old.get(key) != new.get(key)
        }
        # An entry that says the same again was recorded anew, which is a difference too.
        assert {key: sides for key, sides in shown.items() if sides[0] != sides[1]} == differing

    @invariant()
    def shows_every_state(self):
        assert self.store.revision == len(self.states) - 1
        for revision in (len(self.states) - 1, len(self.states) // 2):
            shown = {one.id: (one.subject, one.relation, one.value) for one in self.store.entries(at=revision)}
            assert shown == self.states[revision]
            assert self.store.count(at=revision) == len(shown)

    @invariant()
    def can_be_followed(self):
        for change in self.store.changes_since(self.reached):
            if change.kind == "born":
                self.followed[change.row] = change.entry.value
            else:
                self.followed.pop(change.row, None)
        self.reached = self.store.revision
        assert self.followed == {one.row: one.value for one in self.store.entries()}


StoreMachine.TestCase.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
TestStore = StoreMachine.TestCase
