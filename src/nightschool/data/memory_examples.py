"""Examples with the facts that they need: drawn anew each time with other values, beside entries that mislead.

Whoever learns to read must not be able to remember. So each time an example is seen, the value in its answer and in its entry is
another one of the same relation, or any name of the data; and what may be read is the entry among others, among others alone, or
the entry alone.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nightschool.data.chat.render import Rendered, render_example
from nightschool.data.example import Example, Message, NeededFact, Target
from nightschool.layers.memory_gate import text_for_gate

# Shares of what is drawn; the rest of the values are of the fact's own relation.
_ANY_NAME = 0.2
_NUMBER = 0.05
# How often each kind of misleading entry stands among the candidates.
_SAME_SUBJECT = 0.5
_LIKE_NAMED = 0.5
_NEAREST = 0.6
# How a name is made that is like another one; of one with a number mostly by it, sometimes without it.
_ANOTHER_NUMBER, _NO_NUMBER = 0.6, 0.15
_SWAPPED = 0.3
_WORD_MORE, _WORD_LESS = 0.2, 0.45
_DIGITS = "0123456789"
# Of the facts that the gate finds nearest, so many are drawn at once; of a labelled question's other facts, so many.
_DRAWN_NEAREST = 2
_DRAWN_TARGETS = 4
# A label is as sure of a fact as the gate would be that gives it the same cosines: the sum of two, over its temperature.
_LABEL_TEMPERATURE = 0.05 / 2


class Likely(NamedTuple):
    """A fact that a label names, and its share of what the question means, as far as the label knows."""

    fact: NeededFact
    share: float


class Drawn(NamedTuple):
    """An example as it is seen once: with another value, its own entry, and entries that are near to it but say something else.

    `likely`, of a labelled question, are its own entry and some of the others that the label names; their shares add up to 1.
    """

    example: Example
    entry: NeededFact | None
    misleading: tuple[NeededFact, ...]
    likely: tuple[Likely, ...] = ()


@dataclass(frozen=True)
class FactRanges:
    """What facts of the data speak of: the values of each relation, the subjects, and facts to borrow statements from."""

    values: Mapping[str, tuple[str, ...]]
    names: tuple[str, ...]
    facts: tuple[NeededFact, ...]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> FactRanges:
        """Those of the examples; facts that are a text alone have neither subject nor value."""
        known = (fact for one in examples for fact in (one.fact, *(target.fact for target in one.targets)))
        facts = sorted({fact for fact in known if fact is not None and fact.value}, key=lambda fact: fact.text)
        values: dict[str, set[str]] = defaultdict(set)
        for fact in facts:
            values[fact.relation].add(fact.value)
        return cls(
            {relation: tuple(sorted(of_it)) for relation, of_it in sorted(values.items())},
            tuple(sorted({fact.subject for fact in facts})),
            tuple(facts),
        )

    def draw(self, example: Example, chance: random.Random, nearest: Sequence[NeededFact] = ()) -> Drawn:
        """See the example once. Without a fact, or with one that has no value in the answer, it stays as it is.

        Args:
            example: With or without a fact.
            chance: What is drawn with.
            nearest: What a gate finds for its question that does not answer it; some of it misleads.
        """
        fact = example.fact
        if example.targets:
            likely = _likely(example.targets, chance)
            return Drawn(example, fact, tuple(self._misleading(likely[0].fact, chance)), likely)
        found = self._of_nearest(nearest, chance)
        if fact is None:
            return Drawn(example, None, tuple(found))
        if fact.value and holds_value(example):
            value = self._another(fact, chance)
            example, fact = with_value(example, value), fact.with_value(value)
        return Drawn(example, fact, (*self._misleading(fact, chance), *found))

    def _another(self, fact: NeededFact, chance: random.Random) -> str:
        share = chance.random()
        if share < _ANY_NAME:
            return chance.choice(self.names)
        if share < _ANY_NAME + _NUMBER:
            return str(chance.randint(1, 99_999) if chance.random() < 0.5 else chance.randint(1000, 2100))
        return chance.choice(self.values[fact.relation])

    def _of_nearest(self, nearest: Sequence[NeededFact], chance: random.Random) -> list[NeededFact]:
        if not nearest or chance.random() >= _NEAREST:
            return []
        drawn = chance.sample(nearest, min(_DRAWN_NEAREST, len(nearest)))
        return [fact.with_value(chance.choice(self.values[fact.relation])) for fact in drawn]

    def _misleading(self, fact: NeededFact, chance: random.Random) -> Iterable[NeededFact]:
        """Another relation of the same subject, and the same relation of somebody whose name is partly the same."""
        if not fact.value or len(self.facts) < 2:
            return
        if chance.random() < _SAME_SUBJECT:
            other = chance.choice(self.facts)
            moved = other.with_subject(fact.subject)
            if other.relation != fact.relation and moved.statement != fact.statement:
                yield moved.with_value(chance.choice(self.values[other.relation]))
        if chance.random() < _LIKE_NAMED:
            name = like_named(fact.subject, chance.choice(self.names), chance)
            if name != fact.subject:
                yield fact.with_subject(name).with_value(chance.choice(self.values[fact.relation]))


def _likely(targets: Sequence[Target], chance: random.Random) -> tuple[Likely, ...]:
    """The best target and some of the others, as likely as their scores say."""
    best, *others = targets
    drawn = [best, *chance.sample(others, min(_DRAWN_TARGETS, len(others)))]
    weights = [math.exp((target.score - best.score) / _LABEL_TEMPERATURE) for target in drawn]
    return tuple(Likely(one.fact, weight / sum(weights)) for one, weight in zip(drawn, weights, strict=True))


def like_named(name: str, other: str, chance: random.Random) -> str:
    """A name with another number or none, with a word of another name in place of one of its own or beside them, or with a word less.

    Of a single word it is the other name, or the word and one of that.
    """
    words, theirs = name.split(), other.split()
    numbers = [place for place, word in enumerate(words) if any(letter in _DIGITS for letter in word)]
    share = chance.random() if numbers else 1.0
    if share < _ANOTHER_NUMBER:
        place = chance.choice(numbers)
        words[place] = _another_number(words[place], chance)
        return " ".join(words)
    if share < _ANOTHER_NUMBER + _NO_NUMBER and len(words) > 1:
        words.pop(chance.choice(numbers))
        return " ".join(words)
    if not theirs:
        return other
    way = chance.random()
    if way < _WORD_MORE:
        words.insert(chance.randrange(len(words) + 1), chance.choice(theirs))
    elif len(words) < 2:
        return other
    elif way < _WORD_MORE + _WORD_LESS:
        kept = chance.randrange(1, len(words))
        words = words[:kept] if chance.random() < 0.5 else words[-kept:]
    else:
        words[chance.randrange(len(words))] = chance.choice(theirs)
    return " ".join(words)


def _another_number(word: str, chance: random.Random) -> str:
    """Another digit in place of one, or two that follow each other the other way round."""
    swapped = [n for n in range(len(word) - 1) if {*word[n : n + 2]} <= {*_DIGITS} and word[n] != word[n + 1]]
    if swapped and chance.random() < _SWAPPED:
        at = chance.choice(swapped)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    at = chance.choice([n for n, letter in enumerate(word) if letter in _DIGITS])
    return word[:at] + chance.choice(_DIGITS.replace(word[at], "")) + word[at + 1 :]


def holds_value(example: Example) -> bool:
    """Whether the answer, or the text, says the value of the fact."""
    assert example.fact is not None
    said = example.text if example.text is not None else example.answer
    return bool(example.fact.value) and example.fact.value in (said or "")


def with_value(example: Example, value: str) -> Example:
    """The example with another value in its fact, and in its answer or at the end of its text."""
    fact = example.fact
    assert fact is not None
    if example.text is not None:
        text = value.join(example.text.rsplit(fact.value, 1))
        return replace(example, text=text, fact=fact.with_value(value))
    answer = example.messages[-1]
    whole = re.compile(rf"(?<!\w){re.escape(fact.value)}(?!\w)")
    said = Message(answer.role, whole.sub(lambda _: value, answer.content), answer.weight)
    return replace(example, messages=(*example.messages[:-1], said), fact=fact.with_value(value))


def question_of(example: Example) -> str:
    """What is asked of the memory: the question, or the text before the value."""
    if example.text is None:
        return example.question or ""
    value = example.fact.value if example.fact is not None else ""
    return example.text[: example.text.rfind(value)].strip() if value and value in example.text else example.text


def render_with_fact(tokenizer: Any, example: Example, max_seq_len: int) -> Rendered:
    """Tokens and loss weights: of a conversation as always; of a text, loss lies on the value and what follows it."""
    if example.text is None:
        return render_example(tokenizer, example, max_seq_len)
    encoded = tokenizer(example.text, add_special_tokens=True, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    value = example.fact.value if example.fact is not None else ""
    start = example.text.rfind(value) if value and value in example.text else 0
    weights = [1.0 if end > start else 0.0 for _, end in encoded["offset_mapping"]]
    if weights:
        weights[0] = 0.0
    kept = Rendered(ids[:max_seq_len], weights[:max_seq_len], ["text"] * len(ids[:max_seq_len]))
    return replace(
        kept,
        cut_tokens=len(ids) - len(kept.input_ids),
        cut_trained=sum(weight > 0 for weight in weights[max_seq_len:]),
    )


def entry_ids(tokenizer: Any, fact: NeededFact) -> list[int]:
    """The tokens of an entry as they stand within a sentence, after a space: so it is read, and so a memory finds it."""
    return list(tokenizer(text_for_gate(fact.text), add_special_tokens=False)["input_ids"])


def count_of_candidates(most: int, chance: random.Random) -> int:
    """How many entries there are to read: 1, 2, 4, … or all, so that no number of them is unheard of."""
    counts: Sequence[int] = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < most]
    return chance.choice([*counts, most])
