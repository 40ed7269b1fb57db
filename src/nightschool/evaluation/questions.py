"""From examples to the questions that the gate asks of both versions."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from nightschool.data.example import Example, corrected_answers
from nightschool.data.match import words
from nightschool.evaluation.scores import Kind, ProbeQuestion, Wording
from nightschool.feedback.pins import Pin


def count_words(text: str) -> int:
    """The length of an answer where no tokenizer is at hand."""
    return len(text.split())


def make_questions(
    new_examples: Sequence[Example],
    old_examples: Sequence[Example],
    pins: Sequence[Pin],
    sample: int,
    seed: int,
    *,
    max_answer_tokens: int = 64,
    count_tokens: Callable[[str], int] = count_words,
    replayed: Collection[str] = (),
    general: Sequence[tuple[str, str]] = (),
) -> list[ProbeQuestion]:
    """Return what is asked: new questions, then old ones, then pins, then general ones.

    New examples are asked in the wordings that were not trained, where they have any, else as they were trained; old
    ones as they were trained. If there are more than `sample`, every example gives one question before any gives a
    second one. The choice depends on the seed and the examples' digests, not on their order.

    Left out are plain texts, blank answers, answers of more than `max_answer_tokens`, repeated questions, wordings
    that another new example trains, and old questions that a new example or a pin asks too, or whose answer a
    person has corrected: a correction is no forgetting.

    Args:
        new_examples: What the run taught.
        old_examples: What was accepted before.
        pins: All of them are asked, however long.
        sample: At most this many new, and as many old, questions.
        seed: Chooses the sample.
        max_answer_tokens: Longest expected answer.
        count_tokens: Length of a text in the model's tokens. Without it, words are counted.
        replayed: Digests of the old examples that the run trained again. They are asked only where there are too few
            others: they say least of what was forgotten.
        general: Questions that nobody taught, with their answers; those that are asked otherwise are left out.
    """

    def fits(example: Example) -> bool:
        answer = example.answer
        return bool(answer and words(answer) and example.question and count_tokens(answer) <= max_answer_tokens)

    pinned = [_single("pin", pin.question, pin.answer, "pinned") for pin in pins]
    trained = {_key(_as_trained("new", example)) for example in new_examples if example.question}
    asked = {_key(question) for example in new_examples if example.question for question in _paraphrased(example)}
    taken = trained | asked | {_key(question) for question in pinned}
    new = [
        _untrained(example, trained) or [_as_trained("new", example)] for example in _ordered(new_examples, seed, fits)
    ]
    # False sorts before True, and sorting keeps the order among equals.
    old_in_order = sorted(_ordered(old_examples, seed, fits), key=lambda example: example.digest in replayed)
    wrong = corrected_answers(new_examples)
    old = [
        [_as_trained("old", example)]
        for example in old_in_order
        if example.answer is None or example.answer.strip() not in wrong
    ]
    asked_already = taken | {_key(question) for (question,) in old}
    untaught = [_single("general", question, answer, "general") for question, answer in general]
    return [
        *_sample(new, sample),
        *_sample([[question] for (question,) in old if _key(question) not in taken], sample),
        *_sample([[question] for question in pinned], len(pinned)),
        *_sample([[question] for question in untaught if _key(question) not in asked_already], sample),
    ]


def _ordered(examples: Sequence[Example], seed: int, fits: Callable[[Example], bool]) -> list[Example]:
    """Those that fit, in an order that depends on seed and digests alone."""
    found = sorted(filter(fits, examples), key=lambda example: (example.digest, example.paraphrases))
    random.Random(seed).shuffle(found)
    return found


def _sample(by_example: Sequence[Sequence[ProbeQuestion]], count: int) -> list[ProbeQuestion]:
    """At most `count` different questions: the first of each example, then the second of each, and so on."""
    chosen: dict[str, ProbeQuestion] = {}
    for turn in range(max((len(questions) for questions in by_example), default=0)):
        for questions in by_example:
            if len(chosen) >= count:
                return list(chosen.values())
            if turn < len(questions):
                chosen.setdefault(questions[turn].id, questions[turn])
    return list(chosen.values())


def _as_trained(kind: Kind, example: Example) -> ProbeQuestion:
    return _question(kind, example, None)


def _paraphrased(example: Example) -> list[ProbeQuestion]:
    return [_question("new", example, wording) for wording in example.paraphrases if wording.strip()]


def _untrained(example: Example, trained: set[str]) -> list[ProbeQuestion]:
    """The example's paraphrases, without those that another example trains."""
    return [question for question in _paraphrased(example) if _key(question) not in trained]


def _question(kind: Kind, example: Example, paraphrase: str | None) -> ProbeQuestion:
    """The example's own question, or a paraphrase in its place, after all the turns before it."""
    messages = [{"role": m.role, "content": m.content} for m in example.messages[:-1]]
    asked = max(index for index, message in enumerate(messages) if message["role"] == "user")
    if paraphrase is not None:
        messages[asked] = {"role": "user", "content": paraphrase}
    wording: Wording = "trained" if paraphrase is None else "paraphrase"
    made = _made(kind, messages, messages[asked]["content"], example.answer or "", wording)
    return replace(made, key=example.key, alternatives=example.alternatives)


def _single(kind: Kind, question: str, answer: str, wording: Wording) -> ProbeQuestion:
    return _made(kind, [{"role": "user", "content": question}], question, answer, wording)


def _made(kind: Kind, messages: list[dict[str, str]], question: str, expected: str, wording: Wording) -> ProbeQuestion:
    canonical = json.dumps([kind, messages, expected], ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return ProbeQuestion(f"{kind}-{digest}", kind, question, expected, messages, wording)


def _key(question: ProbeQuestion) -> str:
    return json.dumps([[m["role"], words(m["content"])] for m in question.messages])
