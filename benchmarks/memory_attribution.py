"""Does the entry that an answer is ascribed to make the answer, and do the others that were read not?

Each question is answered freely and greedily, as a server would: the memory finds entries, the layers read them, and each token says
where it came from. Then the entry that is named first, of the first token that came from one, is really removed from the memory, and
the question is asked anew; then, with that one back, another of those that were read is removed. An answer ends with its sentence.
Facts are of subjects that the reader never saw, and on SmolLM2 counterfactual. What the base alone happens to say without any
entry, too (one of a dozen values, by chance), would not change whoever made the answer: the figure is told without these questions, and of all.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import memory_real
import real_model
import torch
from harness import Benchmark
from memory_pararel import PLACE
from memory_readers import Reader, real_reader, small_reader

from nightschool.engine.memory_lookup import open_memory, reading_of
from nightschool.engine.pool import EnginePool
from nightschool.engine.recall import recall
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore

ANSWER_TOKENS, AT_ONCE = 12, 8


@dataclass(frozen=True)
class Question:
    """What is asked of the memory, its tokens as the model gets them, and the answer that the memory has."""

    text: str
    prompt_ids: list[int]
    right: str


@dataclass(frozen=True)
class Answered:
    """The first sentence of an answer, the entries that were read, and the one that is named first."""

    text: str
    read: tuple[str, ...]
    named: str | None


class Asker:
    """A version that reads, in an engine, with a memory of facts."""

    def __init__(self, version: Path, entries: Sequence[NewEntry], folder: Path) -> None:
        from nightschool.models.load import locate
        from nightschool.store.home import Home
        from nightschool.store.names import memory_path

        home = Home(folder / ".nightschool").ensure()
        self._pool = EnginePool(home, num_rows=AT_ONCE)
        self.bound = self._pool.bind(locate(str(version), home, None), lambda _: nullcontext())
        place = memory_path(home, "facts")
        self.store = MemoryStore.create(place)
        self.store.add(entries, author="benchmark")
        self.memory = open_memory(place, self.bound)

    def request(self, question: Question) -> GenerationRequest:
        """The question with what the memory has for it at this moment."""
        found = recall(self.memory, "layers", question.text)
        binding = replace(self.bound.binding, memory_revision=found.label)
        params = SamplingParams(ANSWER_TOKENS, temperature=0)
        reading = reading_of(found.found)
        return GenerationRequest("q", binding, question.prompt_ids, params, reading=reading, wants_sources=True)

    def alone(self, question: Question) -> GenerationRequest:
        """The same, asked without any memory."""
        return replace(self.request(question), reading=None)

    def without(self, entry: str, question: Question) -> GenerationRequest:
        """The same, asked while an entry is not there."""
        self.store.remove(entry, author="benchmark")
        try:
            return self.request(question)
        finally:
            self.store.undo(author="benchmark")

    def answers(self, requests: Sequence[GenerationRequest]) -> list[Answered]:
        """What is said to each, and whence."""
        handles = [self.bound.engine.submit(request) for request in requests]
        answered = []
        for request, handle in zip(requests, handles, strict=True):
            text = handle.result(600).text
            sources = [chunk.source for chunk in handle.chunks() if chunk.source is not None]
            named = next((source.entries[0].entry for source in sources if source.entries), None)
            read = () if request.reading is None else request.reading.entries
            answered.append(Answered(first_sentence(text), read, named))
        return answered

    def close(self) -> None:
        self.memory.close()
        self.store.close()
        self._pool.close(self.bound)


def first_sentence(text: str) -> str:
    """What is said before the first full stop or the end of the line."""
    return text.strip().split("\n")[0].split(".")[0].strip()


def attribution(asker: Asker, questions: Sequence[Question], seed: int = 7) -> dict[str, float]:
    """All figures of these questions."""
    chance = random.Random(seed)
    alone = asker.answers([asker.alone(question) for question in questions])
    first = asker.answers([asker.request(question) for question in questions])
    known = {question.text for question, a, b in zip(questions, first, alone, strict=True) if a.text == b.text}
    ascribed = [(q, a, a.named) for q, a in zip(questions, first, strict=True) if a.named is not None]
    several = [
        (question, answer, chance.choice([entry for entry in answer.read if entry != named]))
        for question, answer, named in ascribed
        if len(answer.read) > 1
    ]
    changed = _changed(asker, ascribed)
    moved = _changed(asker, several)
    by_entry = [is_changed for is_changed, (q, _, _) in zip(changed, ascribed, strict=True) if q.text not in known]
    right = [question.right in answer.text for question, answer in zip(questions, first, strict=True)]
    for question, answer, gone in ascribed[:3]:
        print(f"  {question.text} → {answer.text} ({gone})", flush=True)
    return {
        "questions": len(questions),
        "said_by_the_base_too": len(known),
        "right": share(right),
        "ascribed": len(ascribed),
        "entries_read": sum(len(answer.read) for answer in first) / max(1, len(first)),
        "named_removed_changed": share(by_entry),
        "named_removed_changed_of_all": share(changed),
        "named_removed_changed_where_right": share(
            [is_changed for is_changed, (q, a, _) in zip(changed, ascribed, strict=True) if q.right in a.text]
        ),
        "other_removed": len(several),
        "other_removed_unchanged": share([not is_changed for is_changed in moved]),
    }


def _changed(asker: Asker, asked: Sequence[tuple[Question, Answered, str]]) -> list[bool]:
    again = asker.answers([asker.without(entry, question) for question, _, entry in asked])
    return [after.text != before.text for (_, before, _), after in zip(asked, again, strict=True)]


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(1, len(flags))


def of_reader(reader: Reader, count: int) -> dict[str, float]:
    """The figures of a trained reader, asked about `count` facts of its test."""
    entries = [
        NewEntry(fact.text, fact.subject, fact.relation, fact.value, source=str(number))
        for number, fact in enumerate(reader.facts)
    ]
    about = Counter(fact.subject for fact in reader.facts)
    shuffled = random.Random(3).sample(reader.asked, len(reader.asked))
    # Those first of whose subject there is more to be read.
    chosen = sorted(shuffled, key=lambda number: about[reader.facts[number].subject] < 2)[:count]
    with tempfile.TemporaryDirectory() as scratch:
        asker = Asker(reader.folder, entries, Path(scratch))
        try:
            encode: Callable[[str], Any] = asker.bound.tokenizer
            questions = [
                Question(
                    reader.prompt(number), list(encode(reader.prompt(number))["input_ids"]), reader.facts[number].value
                )
                for number in chosen
            ]
            return attribution(asker, questions) | {"training_cpu_minutes": reader.training_cpu_minutes}
        finally:
            asker.close()


def main() -> None:
    bench = Benchmark(
        "memory_attribution",
        "Does the entry that an answer is ascribed to make it?",
        {"named_removed_changed": {"min": 0.95}, "other_removed_unchanged": {"min": 0.95}},
        has_real=True,
    )
    torch.set_num_threads(memory_real.THREADS)
    if bench.is_real and (real_model.find() is None or not PLACE.exists()):
        sys.exit("This benchmark needs SmolLM2 (make real-model-file) and shared/data/memory.")
    if bench.is_real:
        reader = real_reader(quick=bench.quick)
    else:
        reader = small_reader(spoken=100, steps=80) if bench.quick else small_reader()
    torch.set_num_threads(1)
    figures = of_reader(reader, 40 if bench.quick else 200)
    bench.finish({name: round(value, 4) for name, value in figures.items()})


if __name__ == "__main__":
    main()
