"""The forms in which new examples are studied: a fact that is trained in one wording is known in that one alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nightschool.data.example import Example, Message
from nightschool.data.study.rewordings import (
    Rewording,
    every_rewording,
    reverse_question,
    rewordings,
    statement,
    wording,
)

Origin = Literal["relation", "grammar", "frame", "statement", "reverse", "written"]
"""By what rule a form was made of its example, or that a model has written it."""

# Of two forms for which there is no room, the one with more leaves.
_LEAVES: dict[Origin, int] = {"frame": 2, "grammar": 1, "relation": 0, "statement": 0, "reverse": 0, "written": 0}
FORM_ID = re.compile(r"[0-9a-f]{12}")
_LONGEST_QUESTION = 40
_LONGEST_SHORT_ANSWER = 30
_AS_A_SENTENCE = " Answer in a whole sentence."
_LEAST_TO_KEEP_ASIDE = 2


@dataclass(frozen=True)
class Form:
    """An example in another form. `of` is the digest of that example, whose source, line and id are the form's, too.

    What is `kept_aside` is never trained: the gate asks it.
    """

    example: Example
    of: str
    origin: Origin
    kept_aside: bool = False

    @property
    def id(self) -> str:
        """The same for each form with this wording, by which a person rejects it."""
        return form_id(self.example.question or "")

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads, and `Example.from_json` as an example."""
        return {
            **self.example.to_json(),
            "form": self.id,
            "of": self.of,
            "origin": self.origin,
            "kept_aside": self.kept_aside,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Form:
        """Read what `to_json` wrote."""
        return cls(Example.from_json(row), row["of"], row["origin"], bool(row["kept_aside"]))


def form_id(question: str) -> str:
    """The id of a form, from its wording: 12 hex digits."""
    return hashlib.sha256(wording(question).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def make_forms(
    new: Sequence[Example],
    most: int,
    seed: int,
    *,
    never: Iterable[Example] = (),
    rejected: Collection[str] = (),
) -> list[Form]:
    """Forms of all examples that ask one thing and answer it; the same for the same arguments.

    No form has a wording that an example asks already, that is an example's `paraphrase`, or that an example in `never` has. An example without paraphrases has one form kept aside, if there are two.

    Args:
        new: Examples, in whose order the forms are.
        most: Forms of an example that are trained, itself among them.
        seed: Chooses among those that the rules make.
        never: Examples that are held out.
        rejected: Wordings that a person rejected.
    """
    asked = [example for example in [*new, *never] if example.question is not None]
    taken = {wording(text) for example in asked for text in (example.question or "", *example.paraphrases)}
    taken |= set(rejected)
    forms: list[Form] = []
    for example in new:
        if is_studied(example):
            of_one = _forms_of(example, most, seed, taken)
            taken |= {wording(form.example.question or "") for form in of_one}
            forms += of_one
    return forms


def every_wording(example: Example) -> set[str]:
    """The wordings of all forms that rules can make of an example, whatever the seed."""
    question, answer = example.question or "", example.answer or ""
    found = [question, question.rstrip() + _AS_A_SENTENCE, *every_rewording(question)]
    return {wording(one) for one in [*found, reverse_question(question, answer) or ""]} - {""}


def trained_forms(forms: Iterable[Form]) -> list[Example]:
    """Those that a run learns from, as often as their examples."""
    return [form.example for form in forms if not form.kept_aside for _ in range(form.example.repeat)]


def merged(by_rules: Sequence[Form], written: Sequence[Form], most: int) -> list[Form]:
    """Written forms first, and of those that rules made as many as there is room for, in the order of their examples.

    What only says that something is asked leaves first. What is kept aside stays.
    """
    own: dict[str, list[Form]] = {}
    for form in written:
        own.setdefault(form.of, []).append(form)
    made: dict[str, list[Form]] = {}
    for form in by_rules:
        made.setdefault(form.of, []).append(form)
    made |= {of: [] for of in own if of not in made}
    found: list[Form] = []
    for of, forms in made.items():
        aside = [form for form in forms if form.kept_aside]
        left = [form for form in forms if not form.kept_aside]
        mine = own.get(of, [])
        room = max(0, most - 1 - sum(not form.kept_aside for form in mine))
        while len(left) > room:
            left.pop(max(range(len(left)), key=lambda at: (_LEAVES[left[at].origin], at)))
        found += [*mine, *left, *aside]
    return found


def with_wordings_kept_aside(examples: Iterable[Example], forms: Iterable[Form]) -> list[Example]:
    """The examples, asked in the wordings that were kept aside for them."""
    aside: dict[str, tuple[str, ...]] = {}
    for form in forms:
        if form.kept_aside and form.example.question is not None:
            aside[form.of] = (*aside.get(form.of, ()), form.example.question)
    return [replace(one, paraphrases=(*one.paraphrases, *aside.get(one.digest, ()))) for one in examples]


def is_studied(example: Example) -> bool:
    """Whether an example is a question and its answer, or a correction, and no conversation or text."""
    question, answer = example.question, example.answer
    if question is None or not answer or not answer.strip() or example.messages[-1].weight == 0:
        return False
    num_asked = sum(message.role == "user" for message in example.messages)
    is_plain = not example.rejected and all(message.role != "tool" for message in example.messages)
    return is_plain and (num_asked == 1 or bool(example.corrects)) and len(question.split()) <= _LONGEST_QUESTION


def is_short_answer(example: Example) -> bool:
    """Whether an example is a question and an answer of a sentence or two, or a correction by one: a fact, as far as form can tell."""
    return is_studied(example) and len((example.answer or "").split()) <= _LONGEST_SHORT_ANSWER


def _forms_of(example: Example, most: int, seed: int, taken: Collection[str]) -> list[Form]:
    question, answer = example.question or "", example.answer or ""
    free = [one for one in rewordings(question, seed) if wording(one.question) not in taken]
    aside = _to_keep_aside(free) if not example.paraphrases else None
    trained = [one for one in free if one is not aside]
    forms = [form_of(example, one.question, answer, one.rule) for one in trained]
    said = statement(question, answer)
    backwards = reverse_question(question, answer)
    others: list[Form] = []
    if said is not None and said != answer.strip():
        others.append(form_of(example, question.rstrip() + _AS_A_SENTENCE, said, "statement"))
    if said is not None and backwards is not None:
        others.append(form_of(example, backwards, said, "reverse"))
    others = [form for form in others if wording(form.example.question or "") not in taken]
    room = max(0, most - 1)
    chosen = [*forms[: max(0, room - len(others))], *others][:room]
    kept = (
        []
        if aside is None or not chosen
        else [replace(form_of(example, aside.question, answer, aside.rule), kept_aside=True)]
    )
    return [*chosen, *kept]


def _to_keep_aside(free: Sequence[Rewording]) -> Rewording | None:
    """The wording that differs most, unless there are too few: it is better trained than asked then."""
    real = [one for one in free if one.rule != "frame"]
    return real[0] if len(real) >= _LEAST_TO_KEEP_ASIDE else None


def form_of(example: Example, question: str, answer: str, origin: Origin) -> Form:
    """The example with another last question and answer; what it is not any more, it does not claim."""
    last = max(at for at, message in enumerate(example.messages) if message.role == "user")
    messages = [*example.messages[:last], Message("user", question), *example.messages[last + 1 : -1]]
    messages.append(replace(example.messages[-1], content=answer))
    made = replace(example, messages=tuple(messages), paraphrases=(), rejected="", fact=None)
    return Form(made, example.digest, origin)
