"""Which questions ask the same: two writings of one, or two of a family that ask about the same."""

from __future__ import annotations

import unicodedata

from nightschool.data.example import Example
from nightschool.data.study.families import match

QuestionKey = tuple[str, ...]


def question_key(question: str) -> QuestionKey:
    """Equal for questions that ask the same. A sign within a question counts: `5 + 3` is not `5 - 3`."""
    found = match(question)
    if found is None or found.template in found.family.narrower:
        return (_folded(question),)
    return (found.family.templates[0], _folded(found.subject))


def context_key(example: Example) -> QuestionKey | None:
    """Equal for examples whose last question asks the same after the same turns; None where nothing is asked."""
    context = example.context
    if context is None or context[-1][0] != "user":
        return None
    before = [part for role, content in context[:-1] for part in (role, _folded(content))]
    return (*before, *question_key(context[-1][1]))


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip("?.! ")
