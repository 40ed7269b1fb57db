"""Ways to ask for the same relation in English: a question that is one of a family has all others for its rewordings.

`{s}` is what is asked about, as it stands. Where a family is one to one, `reverse` asks for it by the value `{v}`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


@dataclass(frozen=True)
class Family:
    """Templates that ask the same, one that asks the other way round, or the empty string, and `narrower` ones: they say more
    of the answer than the others do, so they are understood and never made.
    """

    templates: tuple[str, ...]
    reverse: str = ""
    narrower: tuple[str, ...] = ()

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(_pattern(template) for template in (*self.templates, *self.narrower))


class Match(NamedTuple):
    """A question in its family: which of the templates it is, and what it asks about."""

    family: Family
    template: str
    subject: str


def match(question: str) -> Match | None:
    """The first family that a question is of."""
    bare = question.strip().rstrip("?.! ").replace("\u2019", "'")
    for family in FAMILIES:
        for template, pattern in zip((*family.templates, *family.narrower), family.patterns, strict=True):
            found = pattern.fullmatch(bare)
            if found and _is_subject(found["s"]):
                return Match(family, template, found["s"])
    return None


def _pattern(template: str) -> re.Pattern[str]:
    bare = re.escape(template.rstrip("?. ").replace("{s}", "\0")).replace("\0", "(?P<s>.+?)")
    return re.compile(bare, re.IGNORECASE)


_NO_END = re.compile(
    r".*\b(?:valid|open|closed|available|free|allowed|needed|made|of|in|on|at|to|for|by|with|from)", re.IGNORECASE
)
_NO_SUBJECT = re.compile(
    r"\b(?:and|or|who|which|that|where|when|what|how|does|do|did|is|are|was|were|he|she|it|they|you|i)\b", re.IGNORECASE
)


def _is_subject(text: str) -> bool:
    """Whether this can be moved about: a name or a few words, with no clause and no second question in it."""
    return (
        len(text.split()) <= 7
        and not _NO_END.fullmatch(text)
        and not _NO_SUBJECT.search(text)
        and not re.search(r"[,;:()?!]", text)
    )


def _nouns(*templates: str, nouns: tuple[str, ...], more: tuple[str, ...] = (), reverse: str = "") -> Family:
    """A family of nouns that mean the same, each in every template, and templates of its own."""
    return Family((*more, *(template.replace("{n}", noun) for noun in nouns for template in templates)), reverse)


_OF = ("What is the {n} of {s}?", "What is {s}'s {n}?", "Tell me the {n} of {s}.", "Which {n} does {s} have?")
_WHO = ("Who is the {n} of {s}?", "Who is {s}'s {n}?", "Name the {n} of {s}.", "What is the name of the {n} of {s}?")

FAMILIES: tuple[Family, ...] = (
    _nouns(
        *_OF,
        nouns=("job", "profession", "occupation"),
        more=(
            "What does {s} do for a living?", "What does {s} do for work?", "What work does {s} do?", "How does {s} earn a living?",
            "What does {s} work as?", "As what does {s} work?", "What kind of work does {s} do?", "How does {s} earn money?",
        ),
    ),
    Family((
        "Where does {s} live?", "In which place does {s} live?", "Where is {s}'s home?", "Where is the home of {s}?",
        "What place does {s} live in?", "What is the home of {s}?",
    ), narrower=(
        "In which city does {s} live?", "What city does {s} live in?", "In which town does {s} live?", "Which town does {s} live in?",
        "Which city does {s} live in?", "In what city does {s} live?",
    )),
    Family((
        "Where was {s} born?", "What is the birthplace of {s}?", "What is {s}'s place of birth?", "In which place was {s} born?",
        "Name the birthplace of {s}.",
    )),
    Family((
        "When was {s} born?", "What is {s}'s date of birth?", "What is the date of birth of {s}?", "Tell me when {s} was born.",
    )),
    Family((
        "Where is {s} located?", "What is the location of {s}?", "Where can {s} be found?", "Where does one find {s}?",
        "In which place is {s}?", "Where is {s} situated?", "Where can I find {s}?",
    )),
    Family((
        "Where is {s} based?", "Where does {s} have its headquarters?", "Where are the headquarters of {s}?",
        "Where is {s} headquartered?", "In which place is {s} based?", "Where is the head office of {s}?", "Tell me where {s} is based.",
    )),
    Family(
        (
            "Who leads {s}?", "Who is the leader of {s}?", "Who is the head of {s}?", "Who heads {s}?", "Who is in charge of {s}?",
            "Who runs {s}?", "By whom is {s} led?", "Who is {s} led by?",
        ),
        reverse="What does {v} lead?",
    ),
    Family(
        ("Who is the mayor of {s}?", "Who is {s}'s mayor?", "Name the mayor of {s}.", "Which person is the mayor of {s}?",
         "What is the name of {s}'s mayor?", "Who serves as the mayor of {s}?"),
        reverse="Of which place is {v} the mayor?",
    ),
    Family(
        ("What is the capital of {s}?", "Which city is the capital of {s}?", "What is {s}'s capital?", "Name the capital of {s}.",
         "What is the capital city of {s}?", "Which city is {s}'s capital?"),
        reverse="Of what is {v} the capital?",
    ),
    Family((
        "How much does {s} cost?", "What is the price of {s}?", "What does {s} cost?", "What is the cost of {s}?", "Tell me the price of {s}.",
        "What do I pay for {s}?", "How much is {s}?", "How much must one pay for {s}?",
    )),
    Family((
        "When does {s} open?", "What is the opening time of {s}?", "At what time does {s} open?", "From when is {s} open?",
        "What time does {s} open?", "Tell me when {s} opens.",
    )),
    Family((
        "When does {s} close?", "What is the closing time of {s}?", "At what time does {s} close?", "Until when is {s} open?",
        "What time does {s} close?", "Tell me when {s} closes.",
    )),
    Family((
        "When does {s} start?", "When does {s} begin?", "At what time does {s} begin?", "What is the start of {s}?",
        "When is the beginning of {s}?", "Tell me when {s} starts.",
    )),
    Family(("How old is {s}?", "What is the age of {s}?", "What is {s}'s age?", "Tell me the age of {s}.", "What age is {s}?")),
    Family(("How tall is {s}?", "What is the height of {s}?", "What height does {s} have?", "Tell me the height of {s}.")),
    Family(("How long is {s}?", "What is the length of {s}?", "What length does {s} have?", "Tell me the length of {s}.")),
    Family(("How deep is {s}?", "What is the depth of {s}?", "What depth does {s} have?", "Tell me the depth of {s}.")),
    Family(("How heavy is {s}?", "What is the weight of {s}?", "How much does {s} weigh?", "What does {s} weigh?", "Tell me the weight of {s}.")),
    Family(("How big is {s}?", "What is the size of {s}?", "How large is {s}?", "What size does {s} have?", "Tell me the size of {s}.")),
    Family((
        "How many people live in {s}?", "What is the population of {s}?", "How many inhabitants does {s} have?",
        "What is {s}'s population?", "How large is the population of {s}?", "Tell me the number of people in {s}.",
    )),
    Family((
        "How long does {s} take?", "How much time does {s} take?", "What is the duration of {s}?", "Tell me how long {s} takes.", )),
    Family((
        "How long is {s} valid?", "For how long is {s} valid?", "What is the validity of {s}?", "How long does {s} stay valid?",
        "When does {s} lose its validity?", "Tell me how long {s} is valid.",
    )),
    Family((
        "What colour is {s}?", "What is the colour of {s}?", "Which colour does {s} have?", "In what colour is {s}?", "Tell me the colour of {s}.",
        "What is {s}'s colour?",
    )),
    Family((
        "What color is {s}?", "What is the color of {s}?", "Which color does {s} have?", "In what color is {s}?", "Tell me the color of {s}.",
        "What is {s}'s color?",
    )),
    Family((
        "What is {s} made of?", "Of what is {s} made?", "What material is {s} made of?", "What does {s} consist of?",
        "Out of what is {s} made?", "Tell me what {s} is made of.",
    )),
    Family((
        "What is {s} called?", "What is the name of {s}?", "By what name is {s} known?", "Tell me the name of {s}.",
        "What name does {s} have?",
    )),
    Family((
        "What is the phone number of {s}?", "What is {s}'s phone number?", "Under which number can {s} be called?",
        "Which number do I call for {s}?", "Tell me the phone number of {s}.",
    )),
    Family((
        "What is the address of {s}?", "What is {s}'s address?", "At what address is {s}?", "Tell me the address of {s}.",
        "Which address does {s} have?",
    )),
    Family((
        "Which language is spoken in {s}?", "What language is spoken in {s}?", "What do people speak in {s}?", "What is the language of {s}?",
        "Which language do people in {s} speak?", "What language do people speak in {s}?",
    )),
    *(
        _nouns(*_WHO, nouns=nouns)
        for nouns in (
            ("director",), ("chair", "chairperson"), ("owner",), ("teacher",), ("captain",), ("king",), ("queen",), ("president",),
            ("manager",), ("editor",), ("wife",), ("husband",), ("mother",), ("father",), ("sister",), ("brother",), ("boss",),
        )
    ),
    *(
        Family(
            (f"Who {past} {{s}}?", f"By whom was {{s}} {participle}?", f"Who was {{s}} {participle} by?", f"Who is the {agent} of {{s}}?",
             f"Name the {agent} of {{s}}.", f"What is the name of the {agent} of {{s}}?"),
            reverse=f"What {article} {{v}} {participle}?" if article else "",
        )
        for past, participle, agent, article in (
            ("wrote", "written", "author", ""), ("founded", "founded", "founder", "has"), ("invented", "invented", "inventor", "has"),
            ("discovered", "discovered", "discoverer", "has"), ("painted", "painted", "painter", ""), ("composed", "composed", "composer", ""),
            ("built", "built", "builder", ""), ("designed", "designed", "designer", ""), ("directed", "directed", "director", ""),
            ("developed", "developed", "developer", ""), ("created", "created", "creator", ""),
        )
    ),
    *(
        Family((f"When was {{s}} {participle}?", f"In which year was {{s}} {participle}?", f"Tell me when {{s}} was {participle}.",
                f"What year was {{s}} {participle}?", f"In what year was {{s}} {participle}?"))
        for participle in ("founded", "built", "written", "invented", "opened", "published", "released", "painted", "discovered", "created")
    ),
)  # fmt: skip
