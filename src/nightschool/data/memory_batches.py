"""Micro-batches of examples that may read: drawn anew in each epoch, the same for the same epoch and place.

N  tokens of a micro-batch, documents laid end to end
D  documents: the examples, and behind them a twin of each that finds nothing of use, which says what the base alone would
m  places at which the base's own prediction is to stay
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nightschool.data.batches import IGNORED, Batch, Batches
from nightschool.data.example import Example, NeededFact
from nightschool.data.memory_examples import (
    Drawn,
    FactRanges,
    count_of_candidates,
    entry_ids,
    question_of,
    render_with_fact,
)
from nightschool.layers.memory_gate import text_for_gate

# Of a document that finds nothing, so many of its trained places are compared with the base.
_COMPARED_PLACES = 4


class EntryTokens(NamedTuple):
    """An entry of a micro-batch: as it is read, and its subject and relation as the gate sees them. `keys` say who is alike.

    `told` is how many of `ids` come before the value, 0 where there is none; `has_address` is whether it says which of its words are the subject.
    """

    ids: tuple[int, ...]
    subject_ids: tuple[int, ...]
    relation_ids: tuple[int, ...]
    told: int
    keys: tuple[str, str]
    has_address: bool


@dataclass(frozen=True, kw_only=True)
class MemoryBatch(Batch):
    """A micro-batch, with what each of its documents may read.

    `entries` are those of all documents; `candidates` has their numbers for each document, none for a twin; `right` is the number of
    the entry that answers, or -1; `own` is the same, also where it is not among the candidates. `likely` are for each question the entries
    that it means with their shares: its own alone, but where a label names several. `misled` is the number of one that the gate is to be wrong about, or -1. `question_ids` [documents]
    are what the gate is asked. A document reads from the place `reads_from` on, which predicts the first token of its answer. At `places` [m] of the row, what is predicted is to be what is predicted at `twins` [m]; these places carry loss, too.
    """

    entries: tuple[EntryTokens, ...]
    candidates: tuple[tuple[int, ...], ...]
    right: tuple[int, ...]
    own: tuple[int, ...]
    likely: tuple[tuple[tuple[int, float], ...], ...]
    misled: tuple[int, ...]
    question_ids: tuple[tuple[int, ...], ...]
    reads_from: tuple[int, ...]
    places: torch.Tensor
    twins: torch.Tensor


@dataclass(frozen=True)
class MemoryDraw:
    """How examples are drawn: the share without their entry, how often the gate is wrong then, how many candidates at most."""

    irrelevant_share: float
    misled_share: float
    num_candidates: int
    redraw_values: bool


class MemoryBatches(Batches):
    """Examples in micro-batches that are drawn when they are asked for.

    Args:
        examples: With or without a fact; those without find nothing of use in the entries of the others.
        tokenizer: Of the base.
        draw: How they are drawn.
        max_seq_len: In tokens.
        ranges: What values are drawn from; without it, those of the examples.
        nearest: For each example that is kept, facts that a gate finds for it and that do not answer it.
        settings: As for `Batches`.

    Raises:
        NothingToTrain: If no example has an answer.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        draw: MemoryDraw,
        *,
        max_seq_len: int,
        ranges: FactRanges | None = None,
        nearest: Callable[[Sequence[Example]], Sequence[Sequence[NeededFact]]] | None = None,
        **settings: Any,
    ) -> None:
        self.rendered = [render_with_fact(tokenizer, example, max_seq_len) for example in examples]
        super().__init__(self.rendered, **settings)
        self._examples = [examples[number] for number in self.kept]
        self._tokenizer, self._draw, self._max_seq_len = tokenizer, draw, max_seq_len
        self.ranges = FactRanges.of(self._examples) if ranges is None else ranges
        self._order_seed = settings["seed"]
        self._nearest = [()] * len(self._examples) if nearest is None else nearest(self._examples)
        facts = [None if e.fact is None else [*e.fact, *e.targets] for e in self._examples]
        whole = json.dumps([self.fingerprint, vars(draw), facts], ensure_ascii=False).encode("utf-8", "surrogatepass")
        self.fingerprint = hashlib.sha256(whole).hexdigest()

    def get(self, epoch: int, index: int) -> MemoryBatch:
        """Micro-batch number `index` of an epoch. Raises IndexError if there is none."""
        members = self.examples_of(epoch, index)
        chances = [random.Random(f"{self._order_seed} {epoch} {member}") for member in members]
        drawn = [self._drawn(m, chance) for m, chance in zip(members, chances, strict=True)]
        return _Assembly(self._tokenizer, self._draw, self._max_seq_len).put_together(drawn, chances)

    def examples_of(self, epoch: int, index: int) -> list[int]:
        """As `Batches.examples_of`, with the IndexError of `get`."""
        if not 0 <= index < self.num_batches(epoch):
            raise IndexError(
                f"epoch {epoch} has {self.num_batches(epoch)} micro-batches, so there is no number {index}"
            )
        return super().examples_of(epoch, index)

    def _drawn(self, member: int, chance: random.Random) -> Drawn:
        example = self._examples[member]
        drawn = self.ranges.draw(example, chance, self._nearest[member])
        return drawn if self._draw.redraw_values else drawn._replace(example=example, entry=example.fact)


class _Assembly:
    """A micro-batch while it is put together."""

    def __init__(self, tokenizer: Any, draw: MemoryDraw, max_seq_len: int) -> None:
        self._tokenizer, self._draw, self._max_seq_len = tokenizer, draw, max_seq_len
        self._entries: dict[NeededFact, int] = {}

    def put_together(self, drawn: Sequence[Drawn], chances: Sequence[random.Random]) -> MemoryBatch:
        for one in drawn:
            for fact in (one.entry, *(each.fact for each in one.likely), *one.misleading):
                if fact is not None:
                    self._entries.setdefault(fact, len(self._entries))
        rows: list[tuple[list[int], list[float]]] = []
        candidates, right, misled, questions = [], [], [], []
        twins_of: list[int] = []
        for number, (one, chance) in enumerate(zip(drawn, chances, strict=True)):
            found, answer, wrong = self._candidates(one, chance)
            rendered = render_with_fact(self._tokenizer, one.example, self._max_seq_len)
            rows.append((rendered.input_ids, rendered.weights))
            candidates.append(found)
            right.append(answer)
            misled.append(wrong)
            questions.append(self._gate_ids(question_of(one.example)))
            if answer < 0:
                twins_of.append(number)
        own = [-1 if one.entry is None else self._entries[one.entry] for one in drawn]
        likely = [
            tuple((self._entries[each.fact], each.share) for each in one.likely)
            or (((number, 1.0),) if number >= 0 else ())
            for one, number in zip(drawn, own, strict=True)
        ]
        return self._batch(rows, twins_of, candidates, right, own, likely, misled, questions)

    def _candidates(self, one: Drawn, chance: random.Random) -> tuple[tuple[int, ...], int, int]:
        """Numbers of what a document may read, which of them answers, and which the gate is wrong about."""
        count = count_of_candidates(self._draw.num_candidates, chance)
        has_entry = one.entry is not None and chance.random() >= self._draw.irrelevant_share
        answer = self._entries[one.entry] if one.entry is not None and has_entry else -1
        found = [] if answer < 0 else [answer]
        found += [self._entries[fact] for fact in one.misleading]
        subject = None if one.entry is None else one.entry.subject
        others = [
            number
            for fact, number in self._entries.items()
            if number not in found and fact != one.entry and not (subject and fact.subject == subject)
        ]
        chance.shuffle(others)
        found = list(dict.fromkeys([*found, *others]))[:count]
        is_misled = answer < 0 and found and chance.random() < self._draw.misled_share
        wrong = chance.choice(found) if is_misled else -1
        return tuple(found), answer if answer in found else -1, wrong

    def _gate_ids(self, text: str) -> tuple[int, ...]:
        ids = self._tokenizer(text_for_gate(text), add_special_tokens=False)["input_ids"]
        return tuple(ids) or (0,)

    def _entry(self, fact: NeededFact) -> EntryTokens:
        return EntryTokens(
            tuple(entry_ids(self._tokenizer, fact)),
            self._gate_ids(fact.subject or fact.text),
            self._gate_ids(fact.relation or fact.text),
            len(self._gate_ids(fact.statement)) if fact.value and fact.statement.strip() else 0,
            (fact.subject or fact.text, fact.relation or fact.text),
            bool(fact.subject),
        )

    def _batch(
        self,
        rows: list[tuple[list[int], list[float]]],
        twins_of: list[int],
        candidates: list[tuple[int, ...]],
        right: list[int],
        own: list[int],
        likely: list[tuple[tuple[int, float], ...]],
        misled: list[int],
        questions: list[tuple[int, ...]],
    ) -> MemoryBatch:
        documents = [*rows, *(rows[number] for number in twins_of)]
        lengths = torch.tensor([len(ids) for ids, _ in documents])
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        labels = torch.full((int(ends[-1]),), IGNORED)
        weights = torch.zeros(int(ends[-1]))
        places: list[int] = []
        twins: list[int] = []
        reads_from = [0] * len(documents)
        for number, (ids, of_ids) in enumerate(rows):
            start = int(ends[number])
            trained = [place - 1 for place in range(1, len(ids)) if of_ids[place] > 0]
            reads_from[number] = trained[0] if trained else 0
            if right[number] >= 0:
                for place in trained:
                    labels[start + place], weights[start + place] = ids[place + 1], of_ids[place + 1]
                continue
            twin = int(ends[len(rows) + twins_of.index(number)])
            step = max(1, len(trained) // _COMPARED_PLACES) if len(trained) > 4 * _COMPARED_PLACES else 1
            for place in trained[::step][:_COMPARED_PLACES]:
                places.append(start + place)
                twins.append(twin + place)
        flat = [token for ids, _ in documents for token in ids]
        return MemoryBatch(
            input_ids=torch.tensor([flat]),
            position_ids=torch.cat([torch.arange(int(length)) for length in lengths])[None],
            labels=labels[None],
            weights=weights[None],
            cu_seqlens=ends.to(torch.int32),
            max_seqlen=int(lengths.max()),
            tokens_trained=int((weights > 0).sum()) + len(places),
            entries=tuple(self._entry(fact) for fact in self._entries),
            candidates=(*candidates, *(() for _ in twins_of)),
            right=(*right, *(-1 for _ in twins_of)),
            own=(*own, *(-1 for _ in twins_of)),
            likely=tuple(likely),
            misled=(*misled, *(-1 for _ in twins_of)),
            question_ids=tuple(questions),
            reads_from=tuple(reads_from),
            places=torch.tensor(places, dtype=torch.int64),
            twins=torch.tensor(twins, dtype=torch.int64),
        )
