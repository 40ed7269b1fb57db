"""Whatever moment a process dies at, or the disk fills at: aliases are readable and every visible version is whole."""

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from nightschool.errors import Conflict, DiskFull
from nightschool.store.home import Home
from nightschool.store.registry import Registry, VersionMetadata
from nightschool.store.runs import RunStore
from tests.support.crash_points import fill_disk_everywhere, kill_everywhere

NUM_KILLS = int(os.environ.get("NIGHTSCHOOL_TEST_KILLS", "8"))

BUSY = """
import sys
from contextlib import suppress
from pathlib import Path
from nightschool.errors import Conflict, NotFound
from nightschool.store.home import Home
from nightschool.store.registry import Registry, VersionMetadata
from nightschool.store.runs import RunStore

home = Home(Path(sys.argv[1]))
registry, runs = Registry(home), RunStore(home)

def fill(folder):
    (folder / "model.safetensors").write_bytes(b"w" * 200_000)
    (folder / "config.json").write_text("{}")

print("ready", flush=True)
while True:
    run = runs.create({"name": "bot"}, name="bot")
    version = registry.publish("bot", fill, VersionMetadata(run_id=run.id))
    with suppress(NotFound):  # The other process made eight versions meanwhile, and removed this one.
        registry.promote("bot", version.id, by="busy")
        print(version.id, flush=True)
    for old in registry.versions("bot")[8:]:
        with suppress(NotFound, Conflict):  # The other process was quicker.
            registry.remove("bot", old.id)
    for old in runs.ls()[8:]:
        with suppress(NotFound):
            runs.remove(old.id)
"""


def fill(folder):
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")


@pytest.fixture
def registry(tmp_path):
    registry = Registry(Home(tmp_path / "home").ensure())
    for _ in range(2):
        version = registry.publish("bot", fill, VersionMetadata())
        registry.promote("bot", version.id, by="x")
    return registry


def check(registry):
    versions = registry.versions("bot")
    for version in versions:
        version.verify()
        assert version.facts.version == version.id
    ids = {version.id for version in versions}
    aliases = registry.aliases("bot")
    assert set(aliases.values()) <= ids
    assert aliases["latest"] == max(ids)
    assert aliases["champion"] == registry.history("bot")[-1].after
    return aliases


def everywhere(way):
    if way == "killed":
        return kill_everywhere
    return lambda work: fill_disk_everywhere(work, stays_full=way == "full")


@pytest.mark.parametrize("way", ["killed", "full", "full for a moment"])
def test_publishing_that_breaks_anywhere(registry, way):
    before = registry.versions("bot")
    seen_ids = {version.id for version in before}
    for _ in everywhere(way)(lambda: registry.publish("bot", fill, VersionMetadata())):
        check(registry)
        versions = registry.versions("bot")
        assert set(before) <= set(versions)
        for version in versions[: len(versions) - len(before)]:
            assert version.id not in seen_ids
            seen_ids.add(version.id)
            registry.remove("bot", version.id)
    version = registry.publish("bot", fill, VersionMetadata())
    assert check(registry)["latest"] == version.id
    assert not list((registry.home.models / "bot").glob("*.partial"))


@pytest.mark.parametrize("way", ["killed", "full", "full for a moment"])
def test_promotion_and_rollback_that_break_anywhere(registry, way):
    second, first = registry.versions("bot")
    for move, before, after in (
        (lambda: registry.rollback("bot", by="x"), second, first),
        (lambda: registry.promote("bot", second.id, by="x"), first, second),
        (lambda: registry.pin("bot", first.id), second, first),
    ):
        for _ in everywhere(way)(move):
            champion = check(registry)["champion"]
            assert champion in (before.id, after.id)
            if champion == after.id:
                break
        else:
            assert check(registry)["champion"] == after.id


@pytest.mark.parametrize("way", ["killed", "full", "full for a moment"])
def test_removal_that_breaks_anywhere(registry, way):
    doomed = registry.publish("bot", fill, VersionMetadata())
    for _ in everywhere(way)(lambda: registry.remove("bot", doomed.id)):  # noqa: B023
        check(registry)
        if doomed not in registry.versions("bot"):
            doomed = registry.publish("bot", fill, VersionMetadata())
    registry.publish("bot", fill, VersionMetadata())
    assert not list((registry.home.models / "bot").glob("*.partial"))
    assert not doomed.path.exists()


def test_room_is_made_on_a_full_disk_by_removing(registry, monkeypatch):
    doomed = registry.publish("bot", fill, VersionMetadata())
    runs = RunStore(registry.home)
    run = runs.create({}, name="bot")
    write = os.write

    def write_if_there_is_room(handle, content):
        if doomed.path.exists():
            raise OSError(errno.ENOSPC, "full")
        return write(handle, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_if_there_is_room)
        patch.setattr(os, "pwrite", lambda handle, content, offset: write_if_there_is_room(handle, content))
        with pytest.raises(DiskFull, match="Free some space"):
            registry.publish("bot", fill, VersionMetadata())
        with pytest.raises(DiskFull):
            runs.remove(run.id)
        assert not run.path.exists()
        registry.remove("bot", doomed.id)
    check(registry)
    assert doomed not in registry.versions("bot")
    with pytest.raises(Conflict, match="was removed"):
        registry.publish("bot", fill, VersionMetadata(version=doomed.id))


def test_two_busy_processes_that_are_killed_at_random(tmp_path):
    home = Home(tmp_path / "home").ensure()
    registry = Registry(home)
    moments = random.Random(0)
    promised = set()
    for _ in range(NUM_KILLS):
        processes = [
            subprocess.Popen([sys.executable, "-c", BUSY, str(home.path)], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        # After none to two whole turns of the first process, so that a slow machine tests the same.
        seen = [processes[0].stdout.readline().strip() for _ in range(moments.randrange(3))]
        time.sleep(moments.uniform(0, 0.1))
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            lines = [*(seen if process is processes[0] else []), *process.communicate()[0].splitlines()]
            # No id is ever given out twice, also not after a crash; the newest promotion is in the history.
            assert not promised & set(lines)
            promised |= set(lines)
        if registry.versions("bot"):
            for version in registry.versions("bot"):
                version.verify()
            champions = {move.after for move in registry.history("bot")}
            assert promised <= champions
            if champions:
                registry.resolve("bot").verify()
    assert promised
