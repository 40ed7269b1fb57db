"""What does reading an explicit memory in the layers cost while an answer is generated, and what does it save of the prompt?

One engine, as a server runs it, and one version whose layers read. Each question finds most of the sixteen facts of its subject. The same
questions are answered in turn with the memory off, read in the layers, and read from the prompt, which is the peer. Speeds of
decoding are tokens of all answers after the last first token; beside the wall stands the processor's time, which a busy machine
changes less. The weights of the memory's modules are random: what they cost is not what they learned.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import real_model
import torch
from harness import Benchmark, median_ratio
from real_chats import qwen3

from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Message
from nightschool.engine.memory_lookup import open_memory, reading_of
from nightschool.engine.pool import BoundEngine, EnginePool
from nightschool.engine.recall import recall, with_facts
from nightschool.engine.request import Chunk, GenerationRequest, SamplingParams
from nightschool.memory.entry import NewEntry
from nightschool.memory.memory import Memory
from nightschool.memory.store import MemoryStore

PEOPLE = ["Ada Berg", "Bob Finch", "Eve Moreau", "Kim Tanaka", "Zoe Lindt", "Tom Okafor", "Ida Novak", "Leo Serra"]
FACTS = (
    ("lives in", "Oslo"), ("was born in", "Bern"), ("works for", "the harbour office"), ("speaks", "Norwegian"),
    ("speaks", "Latin"), ("plays", "the cello"), ("likes", "black tea"), ("studied at", "the old university"),
    ("drives", "a green van"), ("is a member of", "the rowing club"), ("wrote", "a book about bridges"),
    ("was taught by", "Olga Steen"), ("collects", "postage stamps"), ("is married to", "Pia Holm"),
    ("teaches", "geometry"), ("owns", "a small boat"),
)  # fmt: skip
WAYS = ("off", "layers", "prompt")


@dataclass(frozen=True)
class Told:
    """What one round of answers took: seconds to the last first token, and of the rest the wall's and the processor's."""

    first_seconds: float
    decode_seconds: float
    decode_processor_seconds: float
    prompt_tokens: int


class Contest:
    """A base with memory modules in one engine, a memory of facts, and the questions."""

    def __init__(self, folder: Path, *, is_real: bool, answer_tokens: int) -> None:
        from nightschool.models.memory_modules import MemoryModules, shape_for
        from nightschool.models.memory_version import MemoryVersion, save_memory_folder
        from nightschool.store.home import Home
        from nightschool.store.names import memory_path

        home = Home(folder / ".nightschool").ensure()
        base, model, tokenizer = base_of(folder, is_real)
        with torch.no_grad():
            modules = MemoryModules(shape_for(model, tokenizer), seed=1)
            for fit in (
                modules.reader.subject_fit,
                modules.reader.relation_fit,
            ):  # all that is found fits, so that all of it is read
                fit.bias.fill_(50.0)
        save_memory_folder(modules, MemoryVersion(str(base)), tokenizer, folder / "reader")
        place = memory_path(home, "facts")
        with MemoryStore.create(place) as store:
            store.add(
                (NewEntry(f"{who} {does} {what}.", who, does, what) for who in PEOPLE for does, what in FACTS),
                author="benchmark",
            )
        self._pool = EnginePool(home, num_rows=len(PEOPLE))
        self.bound = bound(self._pool, home, folder / "reader")
        self.memory: Memory = open_memory(place, self.bound)
        self.answer_tokens = answer_tokens
        self._numbers = itertools.count()
        self.entries_read: list[int] = []

    def requests(self, way: str, count: int) -> list[GenerationRequest]:
        """Questions as a server makes requests of them: what is found, is found here."""
        params = SamplingParams(self.answer_tokens, temperature=0, ignore_eos=True)
        made = []
        for who in PEOPLE[:count]:
            # A number that no prompt had before, so that the prefix cache knows none of it.
            question = f"Question {next(self._numbers)}: tell me all that you know of {who}."
            turns: Any = [Message("user", question)]
            binding, reading = self.bound.binding, None
            if way == "layers":
                found = recall(self.memory, "layers", question)
                self.entries_read.append(len(found.found))
                binding, reading = replace(binding, memory_revision=found.label), reading_of(found.found)
            elif way == "prompt":
                # As many as the layers read, which is more than a server puts into a prompt.
                [finding] = self.memory.find([question], len(FACTS))
                turns = with_facts(turns, finding.found)
            ids = render_prompt(self.bound.tokenizer, turns)
            made.append(GenerationRequest("benchmark", binding, ids, params, keeps_prefix=False, reading=reading))
        return made

    def run(self, way: str, count: int) -> Told:
        """Ask `count` questions at once."""
        started = time.perf_counter()
        requests = self.requests(way, count)
        first, marks = threading.Barrier(count + 1), []

        def follow(chunks: Any) -> None:
            seen: list[Chunk] = [next(chunks)]
            first.wait()
            seen += chunks
            assert sum(len(chunk.token_ids) for chunk in seen) == self.answer_tokens

        handles = [self.bound.engine.submit(request) for request in requests]
        threads = [threading.Thread(target=follow, args=(handle.chunks(),)) for handle in handles]
        for thread in threads:
            thread.start()
        first.wait()
        begun, begun_processor = time.perf_counter(), time.process_time()
        for thread in threads:
            thread.join()
        marks += [time.perf_counter() - begun, time.process_time() - begun_processor]
        return Told(begun - started, marks[0], marks[1], sum(len(one.prompt_ids) for one in requests))

    def bytes_of(self, way: str) -> tuple[float, float]:
        """Of one request at its end: bytes of keys and values, and of the entries as its layers read them."""
        [request] = self.requests(way, 1)
        self.bound.engine.submit(request).result(600)
        config = self.bound.engine.loaded.model.config.get_text_config()
        per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        held = per_token * (len(request.prompt_ids) + self.answer_tokens)
        if request.reading is None:
            return held, 0.0
        encoded, modules = request.reading.encoded, self.bound.engine.memory_modules(self.bound.binding)
        assert encoded is not None, "the engine encodes what it reads"
        assert modules is not None, "the version reads"
        prepared = modules.reader.prepare(request.reading)
        tensors = [encoded.before, encoded.at, prepared.pointer_keys, *(t for one in prepared.layers for t in one)]
        return held, float(sum(tensor.nbytes for tensor in tensors))

    def close(self) -> None:
        self.memory.close()
        self._pool.close(self.bound)


def base_of(folder: Path, is_real: bool) -> tuple[Path, Any, Any]:
    """Where the base lies, its model and its tokenizer."""
    if is_real:
        loaded = real_model.load()
        return loaded.path, loaded.model, loaded.tokenizer
    from nightschool.data.tokenizer import train_bpe
    from nightschool.models.export import save_version_folder

    texts = [f"{who} {does} {what}. Tell me all that you know." for who in PEOPLE for does, what in FACTS]
    tokenizer = train_bpe(texts, vocab_size=8192)
    model = qwen3(8192, seed=1).eval()
    save_version_folder(model, tokenizer, folder / "base")
    return folder / "base", model, tokenizer


def bound(pool: EnginePool, home: Any, folder: Path) -> BoundEngine:
    from nightschool.models.load import locate

    return pool.bind(locate(str(folder), home, None), lambda _: nullcontext())


def main() -> None:
    bench = Benchmark(
        "memory_overhead",
        "What does reading up to sixteen entries in the layers cost a token, and save of the prompt?",
        {"decode_ratio": {"min": 0.85}, "decode_ratio_batch": {"min": 0.85}},
        has_real=True,
    )
    torch.set_num_threads(1)
    rounds, tokens = (5, 24) if bench.quick else (15, 64)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        contest = Contest(Path(scratch), is_real=bench.is_real, answer_tokens=tokens)
        try:
            for label, count in (("", 1), ("_batch", len(PEOPLE))):
                figures |= compared(bench, label, count, contest, rounds)
            for way in WAYS:
                held, states = contest.bytes_of(way)
                figures |= {f"kv_bytes_{way}": held} | ({"entry_bytes_layers": states} if states else {})
            figures["entries_read"] = statistics.mean(contest.entries_read)
        finally:
            contest.close()
    bench.finish({name: round(value, 4) for name, value in figures.items()})


def compared(bench: Benchmark, label: str, count: int, contest: Contest, rounds: int) -> dict[str, float]:
    """The figures of `count` answers at a time, all ways in turn."""
    told: dict[str, list[Told]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        # Each way comes first as often as the others; the first round warms up.
        order = [WAYS[(number + place) % len(WAYS)] for place in range(len(WAYS))]
        for way in order:
            one = contest.run(way, count)
            if number:
                told[way].append(one)

    def of(way: str, value: Callable[[Told], float]) -> list[float]:
        return [value(one) for one in told[way]]

    decoded = count * (contest.answer_tokens - 1)
    rate = {way: statistics.median(of(way, lambda one: decoded / one.decode_seconds)) for way in WAYS}
    first = {way: statistics.median(of(way, lambda one: one.first_seconds)) for way in WAYS}
    prompt = {way: told[way][0].prompt_tokens / count for way in WAYS}
    bench.table(
        [
            (f"{way}, {count} at a time", f"{rate[way]:7.1f} tokens/s, first after {first[way] * 1000:6.1f} ms, "
             f"prompts of {prompt[way]:.0f} tokens")
            for way in WAYS
        ]
    )  # fmt: skip

    def ratio(a: str, b: str, value: Callable[[Told], float]) -> float:
        return median_ratio(of(a, value), of(b, value))

    return {
        f"decode_ratio{label}": ratio("off", "layers", lambda one: one.decode_seconds),
        f"decode_ratio_processor{label}": ratio("off", "layers", lambda one: one.decode_processor_seconds),
        f"decode_ratio_prompt{label}": ratio("off", "prompt", lambda one: one.decode_seconds),
        f"tokens_per_second_off{label}": rate["off"],
        f"tokens_per_second_layers{label}": rate["layers"],
        f"first_token_ms_off{label}": first["off"] * 1000,
        f"first_token_ms_layers{label}": first["layers"] * 1000,
        f"first_token_ms_prompt{label}": first["prompt"] * 1000,
        f"first_token_vs_prompt{label}": ratio("layers", "prompt", lambda one: one.first_seconds),
        f"prompt_tokens_saved{label}": prompt["prompt"] - prompt["layers"],
    }


if __name__ == "__main__":
    main()
