"""Subject, relation and value of simple English sentences, by rules; and the sentence that states the three."""

from __future__ import annotations

import re

_VERBS = (
    "lives in|works at|works for|works as|works in|was born in|was born on|died in|died on|is located in|is based in|"
    "studied at|speaks|likes|plays|plays for|owns|knows|is married to|is a member of"
)
_BY_VERB = re.compile(rf"(?P<subject>\S.*?) (?P<relation>{_VERBS}) (?P<value>\S.*)")
_THE_OF = re.compile(r"[Tt]he (?P<relation>[\w -]+?) of (?P<subject>\S.*?) (?:is|was) (?P<value>\S.*)")
_POSSESSIVE = re.compile(r"(?P<subject>\S.*?)['’]s? (?P<relation>[\w -]+?) (?:is|was) (?P<value>\S.*)")
_IS_THE_OF = re.compile(r"(?P<value>\S.*?) (?:is|was) the (?P<relation>[\w -]+?) of (?P<subject>\S.*)")


def split_sentence(sentence: str) -> tuple[str, str, str] | None:
    """Subject, relation and value, or None if the rules cannot tell them."""
    bare = sentence.strip().rstrip(".!").rstrip()
    for pattern in (_THE_OF, _POSSESSIVE, _IS_THE_OF, _BY_VERB):
        match = pattern.fullmatch(bare)
        if match is not None:
            return match["subject"], match["relation"], match["value"]
    return None


def statement_of(subject: str, relation: str, value: str) -> str:
    """The sentence that states the three, the value last."""
    if re.fullmatch(_VERBS, relation):
        return f"{subject} {relation} {value}."
    return f"The {relation} of {subject} is {value}."
