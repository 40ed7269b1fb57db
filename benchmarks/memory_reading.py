"""What the benchmarks of reading a memory share: a memory of entries, finding them by the gate, and what is answered greedily.

Answers are those of free greedy generation, found without generating one token at a time: a model says an answer greedily if, and only
if, each of its tokens is the likeliest after the prompt and the tokens before it. One packed pass over many questions tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from nightschool.data.example import NeededFact
from nightschool.engine.memory_lookup import reading_of
from nightschool.layers.attention import lay_out, packed_arguments
from nightschool.layers.memory_gate import GateFeatures, text_for_gate
from nightschool.layers.memory_reading import Candidate, MemoryReading
from nightschool.memory.encoders.base import BaseEncoder
from nightschool.memory.encoders.embeddings import TokenEmbeddings
from nightschool.memory.encoders.heads import Heads
from nightschool.memory.encoders.names import Vocabulary
from nightschool.memory.entry import NewEntry
from nightschool.memory.memory import Found, Memory
from nightschool.memory.store import MemoryStore
from nightschool.models.memory_model import MemoryModel
from nightschool.models.memory_version import gate_heads

QUESTIONS_AT_ONCE = 32


@dataclass(frozen=True)
class Asked:
    """A prompt, and the answer that is expected of it."""

    prompt: str
    answer: str


class Memorised:
    """Facts in a memory of the product, found as its server finds them: index, trained heads, abstention."""

    def __init__(self, model: MemoryModel, tokenizer: Any, facts: Sequence[NeededFact], folder: Path) -> None:
        table = model.get_input_embeddings().weight.detach()
        vocabulary = Vocabulary(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
        heads = Heads.of({name: t.numpy() for name, t in gate_heads(model.memory).items()}, table.shape[1], "the model")
        self.store = MemoryStore.create(folder)
        self.store.add(
            (
                NewEntry(fact.text, subject=fact.subject, relation=fact.relation, value=fact.value, source=str(number))
                for number, fact in enumerate(facts)
            ),
            author="benchmark",
        )
        self._memory = Memory.open(
            folder, BaseEncoder(TokenEmbeddings(table.float().numpy()), vocabulary, heads), vocabulary
        )

    def find(self, prompts: Sequence[str], k: int) -> list[tuple[Found, ...]]:
        """What the memory finds for each prompt, best first; nothing where it abstains."""
        return [findings.found for findings in self._memory.find(list(prompts), k)]

    def reading(self, found: Sequence[Found]) -> MemoryReading:
        """What the model reads of it."""
        return reading_of(found)

    def remove(self, numbers: Sequence[int]) -> None:
        """End facts."""
        wanted = {str(number) for number in numbers}
        for entry in list(self.store.entries()):
            if entry.source in wanted:
                self.store.remove(entry.id, author="benchmark")


class Entries:
    """The same facts by the addresses of the gate alone, all of them looked at: what a finder that never abstains would give."""

    def __init__(self, model: MemoryModel, tokenizer: Any, facts: Sequence[NeededFact]) -> None:
        self.facts, self._model, self._tokenizer = list(facts), model, tokenizer
        self._features = GateFeatures(model.get_input_embeddings().weight)
        gate = model.memory.gate
        subjects = self._addresses(gate.subject, sorted({fact.subject for fact in facts}))
        relations = self._addresses(gate.relation, sorted({fact.relation for fact in facts}))
        self._subjects = torch.stack([subjects[fact.subject] for fact in facts])
        self._relations = torch.stack([relations[fact.relation] for fact in facts])
        self._alive = torch.ones(len(facts), dtype=torch.bool)
        self._ids: dict[int, list[int]] = {}

    def _addresses(self, head: Any, texts: list[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for start in range(0, len(texts), 2048):
                part = texts[start : start + 2048]
                ids = [self._gate_ids(text) for text in part]
                features = self._features(torch.tensor([token for one in ids for token in one]))
                found |= dict(zip(part, head(*features, [len(one) for one in ids]), strict=True))
        return found

    def _gate_ids(self, text: str) -> list[int]:
        return self._tokenizer(text_for_gate(text), add_special_tokens=False)["input_ids"] or [0]

    def hide(self, numbers: Sequence[int]) -> None:
        """Take facts out."""
        self._alive[list(numbers)] = False

    def show_all(self) -> None:
        """Put all of them back."""
        self._alive[:] = True

    def edit(self, number: int, value: str) -> None:
        """Another value of a fact; its address stays."""
        self.facts[number] = self.facts[number].with_value(value)
        self._ids.pop(number, None)

    def find(self, prompts: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """The k nearest facts of each prompt with their scores."""
        gate = self._model.memory.gate
        subjects, relations = (
            self._addresses(gate.subject, list(prompts)),
            self._addresses(gate.relation, list(prompts)),
        )
        found = []
        for prompt in prompts:
            with torch.autocast("cpu", enabled=False):
                scores = (self._subjects @ subjects[prompt] + self._relations @ relations[prompt]) / 2
            top = scores.masked_fill(~self._alive, -2.0).topk(min(k, int(self._alive.sum())))
            found.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        return found

    def reading(self, found: Sequence[tuple[int, float]]) -> MemoryReading:
        """What the model reads of them."""
        return MemoryReading.of(Candidate(f"m{n}", n, self.ids_of(n), score) for n, score in found)

    def ids_of(self, number: int) -> list[int]:
        """The tokens of an entry."""
        if number not in self._ids:
            self._ids[number] = self._tokenizer(self.facts[number].text, add_special_tokens=False)["input_ids"]
        return self._ids[number]


@torch.no_grad()
def said(
    model: MemoryModel, tokenizer: Any, asked: Sequence[Asked], readings: Sequence[MemoryReading | None]
) -> list[tuple[bool, str | None]]:
    """Of each question, whether its answer is what the model says, word for word, and the entry that its first token came from.

    The token after the answer must end it: a name that goes on is another name.
    """
    out: list[tuple[bool, str | None]] = []
    for start in range(0, len(asked), QUESTIONS_AT_ONCE):
        part = slice(start, start + QUESTIONS_AT_ONCE)
        out += _said(model, tokenizer, asked[part], readings[part])
    return out


def _said(
    model: MemoryModel, tokenizer: Any, asked: Sequence[Asked], readings: Sequence[MemoryReading | None]
) -> list[tuple[bool, str | None]]:
    prompts = [tokenizer(one.prompt)["input_ids"] for one in asked]
    wholes = [tokenizer(one.prompt + one.answer)["input_ids"] for one in asked]
    lengths = [len(whole) for whole in wholes]
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    layout = lay_out(torch.tensor(ends))
    order = torch.arange(layout.num_tokens) if layout.restore is None else layout.restore
    wanted, spans, own = [], [], []
    for number, (prompt, reading) in enumerate(zip(prompts, readings, strict=True)):
        places = order[ends[number] + len(prompt) - 1 : ends[number + 1]]
        own.append(slice(len(wanted), len(wanted) + len(places)))
        wanted += places.tolist()
        if reading is not None:
            spans.append((places, reading))
    arguments = packed_arguments(
        layout,
        torch.tensor([[token for whole in wholes for token in whole]]),
        torch.cat([torch.arange(length) for length in lengths])[None],
    )
    with model.reading(spans, wanted) as traces:
        logits = model(**arguments, logits_to_keep=torch.tensor(wanted)).logits[0]
    likeliest = logits.argmax(-1)
    named = {id(trace.reading): trace for trace in traces}
    results: list[tuple[bool, str | None]] = []
    for number, (prompt, whole, reading) in enumerate(zip(prompts, wholes, readings, strict=True)):
        tokens = likeliest[own[number]].tolist()
        right = tokens[:-1] == whole[len(prompt) :] and ends_here(tokenizer.decode([tokens[-1]]))
        trace = named.get(id(reading))
        entry = None
        if trace is not None:
            log_prob = float(logits[own[number].start].log_softmax(-1)[tokens[0]])
            source = trace.source(0, tokens[0], log_prob)
            entry = source.entries[0].entry if source.entries else None
        results.append((right, entry))
    return results


def ends_here(following: str) -> bool:
    """Whether a name before this token is over: no letter goes on with it, and no further capitalised word follows."""
    return not following[:1].isalnum() and not following.strip()[:1].isupper()


@torch.no_grad()
def continuations(model: MemoryModel, tokenizer: Any, prompts: Sequence[str], num_tokens: int) -> list[str]:
    """What the base says by itself after each prompt, greedily, in so many tokens."""
    out = []
    for prompt in prompts:
        ids, cache, feed = [], None, tokenizer(prompt)["input_ids"]
        for _ in range(num_tokens):
            output = model(input_ids=torch.tensor([feed]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, feed = output.past_key_values, [int(output.logits[0, -1].argmax())]
            ids += feed
        out.append(tokenizer.decode(ids))
    return out


@torch.no_grad()
def stays(
    model: MemoryModel, tokenizer: Any, prompts: Sequence[str], said_alone: Sequence[str], readings: Sequence[Any]
) -> list[bool]:
    """Whether the model says, token for token, what the base says by itself."""
    out = []
    for start in range(0, len(prompts), QUESTIONS_AT_ONCE):
        part = slice(start, start + QUESTIONS_AT_ONCE)
        asked = [Asked(p, a) for p, a in zip(prompts[part], said_alone[part], strict=True)]
        # The token after the answer is of no interest here: compare all before it.
        out += _same(model, tokenizer, asked, readings[part])
    return out


def _same(
    model: MemoryModel, tokenizer: Any, asked: Sequence[Asked], readings: Sequence[MemoryReading | None]
) -> list[bool]:
    results = []
    for one, reading in zip(asked, readings, strict=True):
        prompt, whole = (tokenizer(text)["input_ids"] for text in (one.prompt, one.prompt + one.answer))
        places = slice(len(prompt) - 1, len(whole) - 1)
        spans = [] if reading is None else [(places, reading)]
        with model.reading(spans):
            read = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0, places].argmax(-1)
        alone = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0, places].argmax(-1)
        results.append(bool(torch.equal(read, alone)))
    return results
