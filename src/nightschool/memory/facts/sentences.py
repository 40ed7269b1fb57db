"""Subject, relation and value of simple English sentences, by rules; and the sentence that states the three.

The rules would rather not tell than tell wrongly: a sentence that they do not take apart stays as it is, beside others.

    The capital of Norway is Oslo.      Norway      capital        Oslo
    Oslo is the capital of Norway.      Norway      capital        Oslo
    Oslo is Norway's capital.           Norway      capital        Oslo
    Ada's mother is Eve.                Ada         mother         Eve
    Ada now lives in Oslo.              Ada         lives in       Oslo
    Ada was born in Oslo.               Ada         was born in    Oslo
    Ada is a member of the board.       Ada         is a member of the board
    Ada is a nurse.                     Ada         is a           nurse
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from nightschool.memory.facts.words import (
    ADVERBS,
    BEING,
    DESCRIBING,
    DOUBTS,
    KINDS,
    NO_SUBJECTS,
    OPENINGS,
    PREPOSITIONS,
    VERBS,
)

_STATES = DESCRIBING - {
    "born",
    "built",
    "composed",
    "directed",
    "founded",
    "led",
    "made",
    "painted",
    "published",
    "sold",
    "sung",
    "written",
}
_MOST_SUBJECT_WORDS = 8
_MOST_RELATION_WORDS = 4
_MOST_VALUE_WORDS = 16
_NAME = r"[^;:?!\n]+?"
# In lower case but for abbreviations, so that titles (`The Lord of the Rings`) are none; `place of birth` is one.
_RELATION = (
    r"(?:(?:place|date|country|cause|field|form|head|language|number|domain|area) of "
    r"(?:birth|death|origin|citizenship|work|government|state|publication|activity)|"
    r"(?!of\b)(?:[a-z][\w-]*|[A-Z]{2,})(?: (?!of\b)(?:[a-z][\w-]*|[A-Z]{2,})){0,3})"
)
_PATTERNS = (
    re.compile(rf"[Tt]he (?P<relation>{_RELATION}) of (?P<subject>{_NAME}) (?:is|was|are|were) (?P<value>.+)"),
    re.compile(
        rf"(?P<subject>{_NAME})(?:['’]s|(?<=s)['’]) (?P<relation>{_RELATION}) (?:is|was|are|were) (?P<value>.+)"
    ),
    re.compile(rf"(?P<value>{_NAME}) (?:is|was|are|were) the (?P<relation>{_RELATION}) of (?P<subject>[^;:?!]+)"),
    re.compile(
        rf"(?P<value>{_NAME}) (?:is|was|are|were) (?P<subject>(?:the |[^a-z]){_NAME})(?:['’]s|(?<=s)['’]) (?P<relation>{_RELATION})"
    ),
)
# `The headquarters of Acme are in Oslo`: the place is the value.
_IN = re.compile(r"\A(?:(?:located|based|situated) )?(?:in|at) (?=\S)")
_DONE_BY = re.compile(r"\w+(?:ed|en|ten) (?:by|in|on|at|to|with) ")
# What a value is, said before it: `the city of Oslo` is Oslo; `the position of goalkeeper` belongs to what is said.
_SORT = re.compile(
    r"the (?:(?P<place>city|town|village|country|state|county|province|continent|language|island|religion)|"
    r"(?P<more>position|sport|field|area|role|genre|office|post|rank)) of (?=\S)"
)
_NO_LONGER = re.compile(
    r"(?P<before>.+?) (?:no longer (?P<after>.+)|(?P<being>is|was) (?:no longer|not) (?P<rest>.+)|"
    r"(?:does not|doesn['’]t) (?P<verb>\w+)(?P<tail>.*?)(?: any ?more)?)"
)


class Triple(NamedTuple):
    """What a sentence says of what."""

    subject: str
    relation: str
    value: str


def split_sentence(sentence: str) -> Triple | None:
    """Subject, relation and value, or None if the rules cannot tell them."""
    bare = sentence.strip()
    # One sign alone ends it: the other dot of `Acme Inc..` is of the name.
    bare = (bare[:-1] if bare.endswith((".", "!")) else bare).rstrip()
    if len(bare) > 400 or sentence.rstrip().endswith("?"):
        return None
    for pattern in _PATTERNS:
        match = pattern.fullmatch(bare)
        if match is not None:
            value = _IN.sub("", match["value"].strip())
            found = Triple(match["subject"].strip(), match["relation"].strip(), _without_place(value))
            if _is_relation_noun(found.relation) and not _DONE_BY.match(value) and _is_plain(found):
                return found
    return _split_at_verb(bare.split())


def retracted(sentence: str) -> Triple | None:
    """What a sentence says is no longer so: `Ada no longer lives in Oslo`, `Ada does not live in Oslo any more`."""
    match = _NO_LONGER.fullmatch(sentence.strip().rstrip(".!"))
    if match is None:
        return None
    if match["after"]:
        stated = match["after"]
    elif match["being"]:
        stated = f"{match['being']} {match['rest']}"
    else:
        stated = f"{_third_person(match['verb'])}{match['tail']}"
    return split_sentence(f"{match['before']} {stated}")


def statement_of(subject: str, relation: str, value: str) -> str:
    """The sentence that states the three, the value last."""
    before, between = _frame(relation)
    return f"{before}{subject}{between}{value}{'' if value.endswith(('.', '!', '?')) else '.'}"


@lru_cache(maxsize=4096)
def _frame(relation: str) -> tuple[str, str]:
    """What stands before the subject and between subject and value."""
    words = " ".join(relation.replace("_", " ").split())
    first, *rest = words.casefold().split() or [""]
    last = rest[-1] if rest else ""
    if last in PREPOSITIONS and (first in DESCRIBING or (last == "by" and first.endswith("ed"))):
        return "", f" {'is' if first in _STATES else 'was'} {words} "
    if first in BEING or first in VERBS or first in ("can", "had", "have"):
        return "", f" {words} "
    if last == "of" and first in KINDS - {"part"}:
        return "", f" is {'an' if first[0] in 'aeiou' else 'a'} {words} "
    if last == "of":
        return "", f" is {'' if first == 'part' else 'the '}{words} "
    if last in PREPOSITIONS:
        return "", f" {words} "
    return f"The {words} of ", " is "


def _split_at_verb(words: list[str]) -> Triple | None:
    for place, word in enumerate(words[1 : _MOST_SUBJECT_WORDS + 2], start=1):
        lower = word.casefold()
        if lower in BEING or lower in VERBS:
            end = _end_of_relation(words, place)
            if end is None:
                return None
            subject = words[: place - 1] if place > 1 and words[place - 1].casefold() in ADVERBS else words[:place]
            relation = [word for word in words[place:end] if word.casefold() not in ADVERBS]
            found = _without_sort(Triple(" ".join(subject), " ".join(relation), " ".join(words[end:])))
            return found if _is_plain(found) else None
    return None


def _without_place(value: str) -> str:
    match = _SORT.match(value)
    return value[match.end() :] if match is not None and match["place"] else value


def _without_sort(triple: Triple) -> Triple:
    match = _SORT.match(triple.value)
    if match is None:
        return triple
    said = "" if match["place"] else f" {match[0].rstrip()}"
    return Triple(triple.subject, triple.relation + said, triple.value[match.end() :])


def _end_of_relation(words: list[str], place: int) -> int | None:
    """Where the value begins, behind a verb and what belongs to it; None if there is none, or the rules do not know it."""
    rest = [word.casefold() for word in words[place + 1 : place + 5]]
    skipped = 1 if rest and rest[0] in ADVERBS else 0
    rest = rest[skipped:]
    if not rest:
        return None
    after = place + 1 + skipped
    if words[place].casefold() not in BEING:
        length = 1 if rest[0] in PREPOSITIONS else 0
        is_done = rest[0] in VERBS or rest[0].endswith("ed")
        if words[place].casefold() == "has" and is_done and len(rest) > 1 and rest[1] in PREPOSITIONS:
            length = 2
    elif rest[0] in ("a", "an", "the", "part", "one"):
        kind = rest[1] if len(rest) > 1 and rest[0] in ("a", "an") else rest[0]
        of = rest[2:3] if rest[0] in ("a", "an") else rest[1:2]
        if of == ["of"] and kind in KINDS:
            length = 3 if rest[0] in ("a", "an") else 2
        elif rest[0] in ("a", "an"):
            length = 1
        else:
            return None
    elif rest[0] in PREPOSITIONS - {"of", "as", "to", "about", "after"}:
        length = 1
    elif len(rest) > 1 and rest[1] in PREPOSITIONS and (rest[0] in DESCRIBING or rest[0].endswith("ed")):
        length = 2
    else:
        # `Ada is tall`: what else she is does not contradict it.
        return None
    return after + length if after + length < len(words) else None


def _is_relation_noun(relation: str) -> bool:
    """Whether words between `the` and `of` name a relation: no verb among them."""
    words = relation.casefold().split()
    return 0 < len(words) <= _MOST_RELATION_WORDS and not (set(words) & (BEING | DOUBTS | PREPOSITIONS - {"of", "in"}))


def _is_plain(triple: Triple) -> bool:
    """Whether the parts may be what they were taken for: one clause, a subject that stands for itself, no doubt."""
    subject, value = triple.subject.casefold().split(), triple.value.casefold().split()
    if not subject or not value or subject[0] in NO_SUBJECTS or value[0] in ("not", "no", "never"):
        return False
    if len(subject) > _MOST_SUBJECT_WORDS or len(value) > _MOST_VALUE_WORDS:
        return False
    if any(sign in triple.subject for sign in ';:?!"') or any(sign in triple.value for sign in ";?\n"):
        return False
    if "," in triple.subject and not _is_name_with_comma(triple.subject):
        return False
    if DOUBTS & {*subject, *value} or DOUBTS & set(triple.relation.casefold().split()):
        return False
    # A second clause has a verb of its own: `Oslo and Bob lives in Rome`.
    second = value[value.index("and") + 1 :] if "and" in value else []
    return not (VERBS | BEING) & set(second)


def _is_name_with_comma(subject: str) -> bool:
    """Whether a comma is of the name, as in `Hasbro, Inc.`, and does not follow how, when or where: `Yesterday, Ada`."""
    before, _, after = subject.partition(",")
    words = [word for word in before.split() if word not in ("of", "the", "de", "von", "van", "and")]
    is_name = all(not word[:1].islower() for word in words) and not set("'’") & set(subject)
    return (
        is_name
        and bool(after.strip())
        and "," not in after
        and not after.strip()[0].islower()
        and not _is_adverb(before)
    )


def _is_adverb(words: str) -> bool:
    lower = words.casefold()
    return lower in NO_SUBJECTS or lower in ADVERBS or lower in OPENINGS or (" " not in words and lower.endswith("ly"))


def _third_person(verb: str) -> str:
    """`live` as in `Ada lives`: the form that stands in the sentence that is taken back."""
    lower = verb.casefold()
    if lower == "have":
        return "has"
    if lower.endswith(("s", "x", "z", "ch", "sh")):
        return f"{verb}es"
    return f"{verb[:-1]}ies" if lower.endswith("y") and lower[-2:-1] not in "aeiou" else f"{verb}s"
