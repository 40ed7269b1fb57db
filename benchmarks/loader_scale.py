"""Does the loader of token shards grow with the corpus? Memory, the first batch, seeking, speed, and the order on ranks.

Shards of 0.1, 1 and 4 GB are made, and each corpus is opened by a fresh process. `RSS` is that process's own memory, without
the pages of the mapped files, which belong to the kernel's cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import Benchmark

SEQ_LEN = 1024
ROW_TOKENS = 1024
SHARD_BYTES = 100_000_000
VOCAB_SIZE, EOS = 8192, 0
BATCH = 16
GOALS = {
    "rss_growth": {"max": 1.05},
    "seek_ms": {"max": 1.0},
    "position_bytes": {"max": 1000.0},
    "tokens_per_second": {"min": 20e6},
    "ranks_differ": {"max": 0.0},
}

CHILD = """
import json, os, sys, time
import numpy as np
before = time.perf_counter()
from pathlib import Path
from nightschool.data.shards.shard_sources import open_shards
from nightschool.data.shards.token_batches import Portion, TokenBatches
imported = time.perf_counter()

def own_bytes():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
started = time.perf_counter()
source = open_shards(str(folder), root=folder, cache=folder / "cache")
batches = TokenBatches(source.shards, seq_len=%(seq_len)d, seed=1, group_shards=16, held_out_share=0.01,
                       held_out_tokens=100_000, vocab_size=%(vocab)d)
batches.get(0, 0, %(batch)d)
first_batch = time.perf_counter() - started
peak = own_bytes()
tokens, place, started = 0, 0, time.perf_counter()
while time.perf_counter() - started < seconds:
    batch = batches.get(0, place, %(batch)d)
    tokens += batch.input_ids.numel()
    place = (place + %(batch)d) %% (batches.num_sequences - %(batch)d)
    peak = max(peak, own_bytes()) if place %% (%(batch)d * 64) == 0 else peak
rate = tokens / (time.perf_counter() - started)
seeks = []
for place in np.random.default_rng(0).integers(0, batches.num_sequences - 1, 50).tolist():
    started = time.perf_counter()
    batches.get(1, place, 1)
    seeks.append(time.perf_counter() - started)
print(json.dumps({"first_batch": first_batch, "peak": max(peak, own_bytes()), "rate": rate,
                  "seek": sorted(seeks)[len(seeks) // 2], "tokens": source.shards.index.tokens}))
"""


def make_corpus(folder: Path, size_bytes: int) -> None:
    """Shards of random ids: what is in them changes nothing here."""
    from nightschool.data.shards.shards import INDEX, ShardIndex, ShardInfo, keep_index
    from nightschool.data.shards.tokenize import write_shard

    folder.mkdir()
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB_SIZE, min(SHARD_BYTES, size_bytes) // 2, dtype=np.uint16)
    tokens[:: 2 * SEQ_LEN] = EOS
    count = max(1, size_bytes // SHARD_BYTES)
    first = write_shard(folder / "tokens_00000.npz", tokens, ROW_TOKENS, EOS, "0" * 64)
    facts = [first]
    for number in range(1, count):
        name = f"tokens_{number:05d}.npz"
        # Own pages on disk for each, without tokenizing again.
        (folder / name).write_bytes((folder / first.file).read_bytes())
        facts.append(ShardInfo(**{**vars(first), "file": name}))
    keep_index(folder / INDEX, ShardIndex(tuple(facts), "0" * 64, VOCAB_SIZE, EOS, 4.0))


def measure(folder: Path, seconds: float) -> dict[str, float]:
    """Open the corpus in a fresh process and read from it."""
    code = CHILD % {"seq_len": SEQ_LEN, "vocab": VOCAB_SIZE, "batch": BATCH}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(seconds)], capture_output=True, text=True, check=True
    )
    plain: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return plain


def seek_at_50_billion() -> float:
    """Milliseconds to the sequence at a place of a corpus of 50 billion tokens, epoch just begun: the order alone."""
    from nightschool.data.shards.permutation import SequenceOrder

    sequences = 50_000_000_000 // SEQ_LEN
    order = SequenceOrder([sequences // 1000] * 1000, seed=1, group_shards=16)
    times = []
    for epoch, place in enumerate(np.random.default_rng(0).integers(0, sequences // 1000 * 1000, 20).tolist()):
        started = time.perf_counter()
        order.locate(epoch, np.array([place], dtype=np.int64))
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] * 1e3


def ranks_differ(folder: Path) -> int:
    """Global batches in which 2 or 8 ranks together do not see what one sees, in their order."""
    import torch

    from nightschool.data.shards.shard_sources import open_shards
    from nightschool.data.shards.token_batches import Portion, TokenBatches

    source = open_shards(str(folder), root=folder, cache=folder / "cache")
    batches = TokenBatches(source.shards, seq_len=SEQ_LEN, seed=1, group_shards=16, vocab_size=VOCAB_SIZE)
    differing = 0
    for place in range(0, 20 * BATCH, BATCH):
        whole = batches.get(0, place, BATCH).input_ids
        for world_size in (2, 8):
            parts = [batches.get(0, place, BATCH, Portion(rank, world_size)).input_ids for rank in range(world_size)]
            differing += not torch.equal(torch.cat(parts, dim=1), whole)
    return differing


def position_bytes() -> int:
    """Bytes of all that a resumed run needs to find its next batch."""
    from nightschool.training.state import TrainState

    plain = TrainState("f" * 64, step=10**6, epoch=3, batch_index=10**9, tokens_consumed=10**13).to_json()
    return len(json.dumps({key: plain[key] for key in ("fingerprint", "epoch", "batch_index", "tokens_consumed")}))


def main() -> None:
    bench = Benchmark("loader_scale", "Does the loader grow with the corpus?", GOALS)
    sizes = [100_000_000, 400_000_000] if bench.quick else [100_000_000, 1_000_000_000, 4_000_000_000]
    with tempfile.TemporaryDirectory() as scratch:
        results = []
        for size in sizes:
            folder = Path(scratch) / f"{size}"
            make_corpus(folder, size)
            results.append(measure(folder, 2 if bench.quick else 10))
            bench.table(
                [
                    (f"{size / 1e9:g} GB", f"{results[-1]['peak'] / 1e6:.1f} MB of its own"),
                    ("first batch", f"{results[-1]['first_batch'] * 1e3:.1f} ms"),
                    ("seek and read", f"{results[-1]['seek'] * 1e3:.3f} ms"),
                    ("speed", f"{results[-1]['rate'] / 1e6:.1f} million tokens/s"),
                ]
            )
        differing = ranks_differ(Path(scratch) / f"{sizes[0]}")
    seek = seek_at_50_billion()
    bench.table([("seek at 50 billion tokens", f"{seek:.3f} ms")])
    bench.finish(
        {
            "rss_growth": round(results[-1]["peak"] / results[0]["peak"], 3),
            "first_batch_growth": round(results[-1]["first_batch"] / results[0]["first_batch"], 3),
            "seek_ms": round(max(seek, *(1e3 * result["seek"] for result in results)), 3),
            "position_bytes": position_bytes(),
            "tokens_per_second": round(min(result["rate"] for result in results)),
            "ranks_differ": differing,
        }
    )


if __name__ == "__main__":
    main()
