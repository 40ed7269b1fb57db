"""What does SIGKILL do to a writer of an explicit memory? It is killed at random moments, 200 times.

Every write has three entries or three hundred that belong together, so that half of one would be seen; some are edits, rollbacks
and undos. A write counts as acknowledged when the call has returned and said so through a pipe. Afterwards the memory is opened
again: is every acknowledged write there, is every revision whole, and does every digest match? There is no peer: a store that
loses or mixes facts is no faster one.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from harness import Benchmark

from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore

KILLS = 200
GROUPS = (3, 300)
FORK = multiprocessing.get_context("fork")


def group(number: int, size: int) -> list[NewEntry]:
    """Entries that all say the same number; `size` tells the groups apart."""
    return [NewEntry(subject=f"Person {n} of {size}", relation="number", value=str(number)) for n in range(size)]


def write_until_killed(folder: Path, pipe: int, seed: int) -> None:
    chance = random.Random(seed)
    with MemoryStore.open(folder) as store:
        while True:
            number, kind = store.revision + 1, chance.random()
            if kind < 0.75:
                change = store.add(group(number, chance.choice(GROUPS)), author="writer")
            elif kind < 0.85:
                change = store.rollback(chance.randrange(max(0, number - 5), number), author="writer")
            else:
                change = store.add(
                    [*group(number, GROUPS[0]), NewEntry(f"It was write {number}, says the log.")], author="writer"
                )
            os.write(pipe, b"%d\n" % change.revision)


def killed_writer(folder: Path, chance: random.Random, seed: int) -> int:
    """The newest revision that a writer acknowledged before it was killed; 0 if it was killed before it acknowledged any."""
    end, pipe = os.pipe()
    writer = FORK.Process(target=write_until_killed, args=(folder, pipe, seed))
    writer.start()
    os.close(pipe)
    time.sleep(chance.uniform(0.005, 0.4))
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert writer.exitcode == -signal.SIGKILL, "the writer ended by itself"
    said = b""
    while more := os.read(end, 1 << 16):
        said += more
    os.close(end)
    whole = said.split(b"\n")[:-1]
    return int(whole[-1]) if whole else 0


def half_done(store: MemoryStore, revision: int) -> int:
    """How many groups of a revision say more than one number, or are not complete."""
    numbers: dict[str, set[str]] = {}
    members: Counter[str] = Counter()
    for entry in store.entries(at=revision):
        if entry.subject is not None and entry.value is not None:
            which = entry.subject.rpartition(" ")[2]
            numbers.setdefault(which, set()).add(entry.value)
            members[which] += 1
    return sum(len(numbers[which]) > 1 or members[which] != int(which) for which in numbers)


def main() -> None:
    bench = Benchmark(
        "memory_durability",
        "What does SIGKILL do to a writer of an explicit memory?",
        {"acknowledged_lost": {"max": 0}, "half_visible": {"max": 0}, "damaged": {"max": 0}, "kills": {"min": KILLS}},
    )
    kills, chance = 40 if bench.quick else KILLS, random.Random(11)
    lost = half = damaged = acknowledged = writes_cut = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "memory"
        MemoryStore.create(folder).close()
        before = 0
        for seed in range(kills):
            newest = killed_writer(folder, chance, seed) or before
            with MemoryStore.open(folder) as store:
                reached = store.revision
                lost += max(0, newest - reached)
                acknowledged += newest - before
                # At most the write that was under way is there without having been acknowledged.
                writes_cut += reached - newest
                half += sum(half_done(store, revision) for revision in {newest, reached})
                if seed % 10 == 9 or seed == kills - 1:
                    damaged += len(store.check().findings)
            before = reached
    bench.table(
        [
            (f"{kills} kills", f"{acknowledged:,} acknowledged writes, {lost} of them lost"),
            ("half of a write seen", str(half)),
            ("written whole, but killed before it said so", str(writes_cut)),
            ("findings of the checks", str(damaged)),
        ]
    )
    figures = {"acknowledged_lost": lost, "half_visible": half, "damaged": damaged, "acknowledged": acknowledged}
    bench.finish(figures if bench.quick else figures | {"kills": kills})


if __name__ == "__main__":
    main()
