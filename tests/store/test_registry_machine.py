"""Any sequence of moves agrees with a model of a few lines."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from nightschool.errors import Conflict, NotFound
from nightschool.store.home import Home
from nightschool.store.registry import Registry, VersionMetadata


class RegistryMachine(RuleBasedStateMachine):
    """`champions` is the stack that rollbacks pop; what is removed is passed over."""

    ids = Bundle("ids")

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.registry = Registry(Home(self.folder))
        self.existing, self.ever, self.champions = [], set(), []
        self.pinned = False
        self.aliases = {}

    def teardown(self):
        shutil.rmtree(self.folder)

    @property
    def champion(self):
        return self.champions[-1] if self.champions else None

    @property
    def previous_index(self):
        for index in range(len(self.champions) - 2, -1, -1):
            if self.champions[index] in self.existing and self.champions[index] != self.champion:
                return index
        return None

    def attempt(self, error, move):
        if error is None:
            move()
            return True
        with pytest.raises(error):
            move()
        return False

    @rule(target=ids)
    def publish(self):
        version = self.registry.publish("bot", lambda folder: (folder / "w").write_text("w"), VersionMetadata()).id
        assert version not in self.ever
        self.ever.add(version)
        self.existing.append(version)
        return version

    @rule(version=ids)
    def promote(self, version):
        error = NotFound if version not in self.existing else None
        if error is None and self.pinned and version != self.champion:
            error = Conflict
        if self.attempt(error, lambda: self.registry.promote("bot", version, by="m")) and version != self.champion:
            self.champions.append(version)

    @rule()
    def rollback(self):
        index = self.previous_index
        error = NotFound if not self.existing else Conflict if index is None or self.pinned else None
        if self.attempt(error, lambda: self.registry.rollback("bot", by="m")):
            del self.champions[index + 1 :]

    @rule(version=ids)
    def pin(self, version):
        error = NotFound if version not in self.existing else None
        if error is None and self.pinned and version != self.champion:
            error = Conflict
        if self.attempt(error, lambda: self.registry.pin("bot", version)):
            self.pinned = True
            if version != self.champion:
                self.champions.append(version)

    @rule()
    def unpin(self):
        if self.attempt(None if self.pinned else Conflict, lambda: self.registry.unpin("bot")):
            self.pinned = False

    @rule(version=ids, alias=st.sampled_from(["stable", "canary"]))
    def set_alias(self, version, alias):
        error = None if version in self.existing else NotFound
        if self.attempt(error, lambda: self.registry.set_alias("bot", alias, version)):
            self.aliases[alias] = version

    @rule(version=ids)
    def remove(self, version):
        index = self.previous_index
        in_use = {self.champion, self.champions[index] if index is not None else None, *self.aliases.values()}
        error = NotFound if version not in self.existing else Conflict if version in in_use else None
        if self.attempt(error, lambda: self.registry.remove("bot", version)):
            self.existing.remove(version)

    @invariant()
    def agrees(self):
        index = self.previous_index
        expected = {
            "champion": self.champion,
            "latest": max(self.existing, default=None),
            "previous": self.champions[index] if index is not None else None,
            **self.aliases,
        }
        assert self.registry.aliases("bot") == {alias: version for alias, version in expected.items() if version}
        versions = self.registry.versions("bot")
        assert [version.id for version in versions] == sorted(self.existing, reverse=True)
        for version in versions:
            version.verify()


RegistryMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestRegistryMachine = RegistryMachine.TestCase
