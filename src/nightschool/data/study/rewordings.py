"""Other wordings of an English question, made by rules: the same question, never another one, and never nonsense.

Where a question is not understood, fewer are made, or none: what stands there is studied as truth.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator
from typing import Literal, NamedTuple

from nightschool.data.study.families import Match, match
from nightschool.data.study.grammar import Question, asks_for_subject, is_english, parse

Rule = Literal["relation", "grammar", "frame"]
"""What a rewording rests on: a family of questions for one relation, the grammar of the question, or words around it."""

MOST_FRAMES = 2
_FRAMES = ("I have a question: {q}", "Please answer this: {q}", "Can you help me? {q}", "A short question: {q}")
_INDIRECT = (
    "Do you know {c}?", "Can you tell me {c}?", "Tell me {c}.", "I would like to know {c}.", "Please say {c}.", "Could you say {c}?",
)  # fmt: skip
_ASKS = tuple(frame.partition(" {c}")[0] for frame in _INDIRECT)
_YES_NO = (
    "Is it true that {c}?",
    "Do you know whether {c}?",
    "Can you tell me whether {c}?",
    "I would like to know whether {c}.",
)
_ARTICLES = frozenset(("a", "an", "the"))


class Rewording(NamedTuple):
    """A question in other words, and by what rule."""

    question: str
    rule: Rule


def wording(text: str) -> str:
    """A question without what two writings of the same wording may differ in: case, marks, articles, space."""
    found = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(word for word in found if word not in _ARTICLES)


def rewordings(question: str, seed: int) -> list[Rewording]:
    """All other wordings of a question that the rules make, those first that differ most; in an order that seed and question give."""
    asked, tail = _parted(question)
    if not is_english(asked) or "\n" in question:
        return []
    order = random.Random(f"{seed}:{question}")
    by_rule = _by_rule(asked)
    for made in by_rule.values():
        order.shuffle(made)
    # Those that only say that something is asked differ least.
    by_rule["grammar"].sort(key=lambda made: made.startswith(_ASKS))
    del by_rule["frame"][MOST_FRAMES:]
    mixed = _in_turn(
        [Rewording(one, "relation") for one in by_rule["relation"]],
        [Rewording(one, "grammar") for one in by_rule["grammar"]],
    )
    found: dict[str, Rewording] = {wording(asked): Rewording(asked, "frame")}
    for one in [*mixed, *(Rewording(text, "frame") for text in by_rule["frame"])]:
        found.setdefault(wording(one.question), one)
    return [one._replace(question=f"{one.question}{tail}") for one in list(found.values())[1:]]


def every_rewording(question: str) -> list[str]:
    """All that `rewordings` may make with any seed."""
    asked, tail = _parted(question)
    return [f"{one}{tail}" for made in _by_rule(asked).values() for one in made]


def _by_rule(asked: str) -> dict[Rule, list[str]]:
    return {
        "relation": list(_of_family(match(asked))),
        "grammar": list(_of_grammar(asked)),
        "frame": [frame.format(q=asked) for frame in _FRAMES] if asked.endswith("?") else [],
    }


def reverse_question(question: str, answer: str) -> str | None:
    """The question that asks for what `question` asks about, by its answer: None unless the relation is one to one and the answer a name."""
    found = match(question)
    name = answer.strip().rstrip(".")
    if (
        found is None
        or not found.family.reverse
        or not name[:1].isupper()
        or len(name.split()) > 4
        or re.search(r"[,;:.?!]", name)
    ):
        return None
    return found.family.reverse.format(v=name)


def statement(question: str, answer: str) -> str | None:
    """A question and its answer as a sentence; None where no rule is sure of it. An answer that is one stays as it is."""
    said = answer.strip()
    if len(said.split()) > 3 and said.endswith("."):
        return said
    taken = parse(question)
    if taken is None or not taken.subject or not said or re.search(r"[.?!]\s", said):
        return None
    said = said.rstrip(".")
    if taken.predicate == taken.aux and taken.wh in {"what", "who"}:
        return f"{_capital(taken.subject)} {taken.aux} {said}."
    if taken.predicate.endswith(" called"):
        return f"{_capital(taken.clause)} {said}."
    if taken.wh in {"where", "when"} and re.match(
        r"(?:in|at|on|near|from|to|after|before|until|every|under|behind|opposite)\b", said, re.IGNORECASE
    ):
        return f"{_capital(taken.clause)} {_small(said)}."
    return None


def _parted(question: str) -> tuple[str, str]:
    """What is asked, and what stands behind it, such as how to answer."""
    asked, mark, tail = question.strip().partition("?")
    return (asked + mark, tail) if mark and "?" not in tail else (question.strip(), "")


def _in_turn(*lists: list[Rewording]) -> list[Rewording]:
    longest = max(map(len, lists))
    return [one[at] for at in range(longest) for one in lists if at < len(one)]


def _of_family(found: Match | None) -> Iterator[str]:
    if found is None:
        return
    for template in found.family.templates:
        if template == found.template or ("{s}'s" in template and not _takes_genitive(found.subject)):
            continue
        made = template.format(s=found.subject)
        yield made if not template.startswith("{s}") else _capital(made)


def _takes_genitive(subject: str) -> bool:
    """Whether `'s` behind it reads well: one short name or noun in the singular."""
    words = subject.split()
    return (
        len(words) <= 3
        and not words[-1].lower().endswith("s")
        and not {"of", "in", "for", "at", "on", "to", "with"} & set(words)
    )


def _of_grammar(question: str) -> Iterator[str]:
    if re.match(r"(?:tell me|name) (?:the|where|when|who|what|how) ", question, re.IGNORECASE) and question.endswith(
        "."
    ):
        said = re.sub(r"^(?:tell me|name) ", "", question, flags=re.IGNORECASE).rstrip(".")
        yield from (frame.format(c=said) for frame in _INDIRECT if frame != "Please say {c}.")
        return
    if asks_for_subject(question):
        yield from (frame.format(c=_small(question.rstrip("?"))) for frame in _INDIRECT)
        return
    taken = parse(question)
    if taken is None:
        return
    if not taken.wh:
        yield from (frame.format(c=taken.clause) for frame in _YES_NO)
        return
    yield from (frame.format(c=f"{taken.wh} {taken.clause}") for frame in _INDIRECT)
    yield from _in_place(taken)
    swapped = re.sub(r"^(what|which)(?= \w)", lambda at: {"what": "which", "which": "what"}[at[1]], taken.wh)
    if swapped != taken.wh and not taken.wh.startswith("what time"):
        yield _capital(f"{swapped} {question.strip()[len(taken.wh) + 1 :]}")
    if taken.predicate != taken.aux and not taken.wh.startswith("how"):
        was = "was" if taken.aux in {"did", "was", "were"} else "is"
        yield f"{_capital(taken.wh)} {was} it that {taken.clause}?"
    if taken.wh == "where" and taken.predicate != taken.aux:
        yield f"What is the place where {taken.clause}?"
    yield from _genitive(taken)


def _in_place(taken: Question) -> Iterator[str]:
    """With what is asked for where its answer would stand."""
    if not taken.subject:
        return
    has_object = len(taken.predicate.split()) > 1
    if (
        taken.wh.split()[0] in {"where", "when", "in", "on", "at", "by", "to", "from", "until", "under"}
        or taken.wh == "how long"
        or not has_object
    ):
        yield f"{_capital(taken.clause)} {taken.wh}?"


def _genitive(taken: Question) -> Iterator[str]:
    """`The head of the school` and `the school's head` for one another."""
    if taken.wh not in {"what", "who"} or taken.predicate != taken.aux:
        return
    of = re.fullmatch(r"the ([\w -]+?) of ((?:the )?[\w.' -]+)", taken.subject)
    if of and _takes_genitive(of[2]) and " of " not in of[2] and len(of[1].split()) <= 2:
        yield f"{_capital(taken.wh)} {taken.aux} {of[2]}'s {of[1]}?"
    has = re.fullmatch(r"([\w. -]+)'s ([\w -]+)", taken.subject)
    if has and len(has[2].split()) <= 3:
        yield f"{_capital(taken.wh)} {taken.aux} the {has[2]} of {has[1]}?"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _small(text: str) -> str:
    return text[:1].lower() + text[1:]
