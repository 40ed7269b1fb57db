"""What does the store of an explicit memory cost? A million entries: written, opened, edited, rolled back, read, checked, purged.

The peer of a durable edit is the disk: how long it takes to sync the page that SQLite appends. Times are those of the processor
where the disk does not matter, and of the clock beside the disk's own where it does.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from harness import Benchmark

from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.store.atomic import folder_bytes

ENTRIES = 1 << 20
EDITS = 10_000
DURABLE = 200
RELATIONS = ("lives in", "was born in", "works for", "place of birth", "mother")
GOALS = {
    "bulk_cpu_seconds": {"max": 60.0},
    "open_seconds": {"max": 1.0},
    "rollback_cpu_seconds": {"max": 0.2},
    "durable_edit_ms": {"max": 5.0},
}


def facts(count: int) -> Iterator[NewEntry]:
    for number in range(count):
        subject, relation = divmod(number, len(RELATIONS))
        yield NewEntry(
            subject=f"Person {subject} of Town{subject % 977}",
            relation=RELATIONS[relation],
            value=f"Place {number * 7919 % 50_000}",
            source="facts.jsonl",
        )


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def sync_seconds(folder: Path) -> list[float]:
    """How long the disk takes to keep what one edit appends to the log: some pages of 4 KiB."""
    found = []
    with (folder / "floor").open("wb", buffering=0) as file:
        for _ in range(DURABLE):
            file.write(os.urandom(5 * 4120))
            begin = time.perf_counter()
            os.fsync(file.fileno())
            found.append(time.perf_counter() - begin)
    return found


def main() -> None:
    bench = Benchmark("memory_store", "What does the store of an explicit memory cost?", GOALS)
    count = ENTRIES // 16 if bench.quick else ENTRIES
    chance = random.Random(5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "memory"
        store = MemoryStore.create(folder)
        bulk, bulk_cpu = timed(lambda: store.add(facts(count), author="bench"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = folder_bytes(folder) / count
        store.close()
        opened, _ = timed(lambda: (MemoryStore.open(folder).get("m1"), store.count()))
        edits, floors = [], sync_seconds(folder)
        for number in range(DURABLE):
            entry = f"m{chance.randrange(count) + 1}"
            edits.append(timed(lambda: store.edit(entry, author="bench", value=f"New {number}"))[0])  # noqa: B023
        floors += sync_seconds(folder)
        before = store.revision
        some = chance.sample(range(count), EDITS)
        changes = [
            NewEntry(
                subject=f"Person {number // 5} of Town{number // 5 % 977}",
                relation=RELATIONS[number % 5],
                value=f"V {number}",
            )
            for number in some
        ]
        edited, edited_cpu = timed(lambda: store.add(changes, author="bench"))
        rolled, rolled_cpu = timed(lambda: store.rollback(before, author="bench"))
        read, read_cpu = timed(lambda: sum(1 for _ in store.entries()))
        searched, _ = timed(lambda: store.search("person 4242"))
        checked, _ = timed(lambda: store.check().is_whole or exit("the check found something"))
        purged, _ = timed(lambda: store.purge("m77", author="bench"))
        store.close()
    edit_ms, floor_ms = 1000 * statistics.median(edits), 1000 * statistics.median(floors)
    bench.table(
        [
            (
                f"{count:,} facts in one write",
                f"{bulk:.1f} s, {bulk_cpu:.1f} s of CPU, {peak:.0f} MiB at most, {size:.0f} B each",
            ),
            ("open and read one", f"{1000 * opened:.1f} ms"),
            ("a durable edit", f"{edit_ms:.2f} ms; the disk alone takes {floor_ms:.2f} ms to sync as much"),
            (f"{EDITS:,} edits in one write", f"{1000 * edited:.0f} ms, {1000 * edited_cpu:.0f} ms of CPU"),
            ("their rollback", f"{1000 * rolled:.0f} ms, {1000 * rolled_cpu:.0f} ms of CPU"),
            ("read all", f"{read:.1f} s, {read_cpu:.1f} s of CPU"),
            ("search by two words", f"{1000 * searched:.0f} ms"),
            ("check all", f"{checked:.1f} s"),
            ("purge one", f"{purged:.1f} s"),
        ]
    )
    bench.finish(
        {
            "entries": count,
            "bulk_cpu_seconds": round(bulk_cpu, 2),
            "bulk_seconds": round(bulk, 2),
            "peak_mib": round(peak, 1),
            "bytes_per_entry": round(size, 1),
            "open_seconds": round(opened, 4),
            "durable_edit_ms": round(edit_ms, 3),
            "sync_ms": round(floor_ms, 3),
            "rollback_cpu_seconds": round(rolled_cpu, 4),
            "rollback_seconds": round(rolled, 4),
            "read_cpu_seconds": round(read_cpu, 2),
            "search_seconds": round(searched, 3),
            "check_seconds": round(checked, 2),
            "purge_seconds": round(purged, 2),
        }
    )


if __name__ == "__main__":
    main()
